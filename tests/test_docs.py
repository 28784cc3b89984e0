"""The API reference: it builds without a warning, and holds every public name with its text."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pdoc")
for library in ("lightning", "transformers"):
    pytest.importorskip(library)

SCRIPT = Path(__file__).parent.parent / "docs" / "reference.py"
specification = importlib.util.spec_from_file_location("reference", SCRIPT)
reference = importlib.util.module_from_spec(specification)
specification.loader.exec_module(reference)

modules = pytest.mark.parametrize("name", reference.MODULES)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The text of each page, by module."""
    folder = tmp_path_factory.mktemp("pages")
    built = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True)
    assert (built.returncode, built.stderr) == (0, "")
    assert (folder / "index.html").exists()
    written = {path.relative_to(folder): path.read_text() for path in folder.rglob("*.html")}
    return {name: written[Path(f"{name.replace('.', '/')}.html")] for name in reference.MODULES}


def public(name):
    """What a module calls public, apart from modules and plain values."""
    module = importlib.import_module(name)
    assert module.__all__
    return {
        each: getattr(module, each)
        for each in module.__all__
        if callable(getattr(module, each)) and not inspect.ismodule(getattr(module, each))
    }


@modules
def test_every_public_name_is_on_the_page(pages, name):
    for each in public(name):
        start = pages[name].find(f'<section id="{each}">')
        assert start >= 0, each
        section = pages[name][start:].partition("</section>")[0]
        shown = re.search(r'<div class="docstring">(.*?)</div>', section, re.S)
        assert shown, each
        assert re.sub(r"<[^>]+>", "", shown[1]).strip(), each


@modules
def test_every_public_name_has_a_docstring_of_its_own(name):
    for each, value in {name: importlib.import_module(name), **public(name)}.items():
        assert (value.__doc__ or "").strip(), each
        if inspect.isclass(value):
            assert not re.match(rf"{each}\(.*\)$", value.__doc__), f"{each}: the dataclass's own"


def test_nothing_else_is_shown(pages):
    shown = re.findall(r'<section id="([^".]+)"', pages["wus_ext"])
    assert set(shown) <= set(importlib.import_module("wus_ext").__all__)


def test_public_modules_of_the_package_have_pages():
    package = importlib.import_module("wus_ext")
    inside = [each for each in package.__all__ if inspect.ismodule(getattr(package, each))]
    assert {f"wus_ext.{each}" for each in inside} <= set(reference.MODULES)
