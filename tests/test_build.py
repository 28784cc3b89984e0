"""The build's search for a CUDA toolkit, and what a wrong or missing build says."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import setuptools
import torch

import wus_ext

ROOT = Path(__file__).parent.parent
PACKAGE = Path(wus_ext.__file__).parent
OLDEST_SETUPTOOLS = 77
HEADERS = ("cuda_runtime.h", "cublas_v2.h", "cusparse.h", "cusolverDn.h")


# An editable installation would lend its own extension to a copy that has none.
IMPORT = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
import wus_ext
"""


def imported_from(folder: Path) -> subprocess.CompletedProcess:
    """`import wus_ext` from a folder, in a Python of its own."""
    return subprocess.run(
        [sys.executable, "-c", IMPORT],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


def copied(folder: Path, extension: str | None) -> subprocess.CompletedProcess:
    shutil.copytree(
        PACKAGE, folder / "wus_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    if extension is not None:
        (folder / "wus_ext" / "_C.py").write_text(extension)
    return imported_from(folder)


@pytest.mark.parametrize(
    ("extension", "message"),
    [
        (None, "wus_ext is not built for this Python; rebuild it with: pip install"),
        (
            "def build_info(): return {'torch': '1.2.3+cu1'}",
            f"built for torch 1.2.3+cu1, but torch {torch.__version__} is installed; rebuild",
        ),
        (
            "raise ImportError('undefined symbol: _ZN2at')",
            f"built for another torch than the installed {torch.__version__} (undefined symbol",
        ),
    ],
    ids=["missing", "other_version", "undefined_symbol"],
)
def test_an_unusable_extension_is_one_sentence(tmp_path, extension, message):
    result = copied(tmp_path, extension)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert message in last


def test_sources_that_are_not_built_say_so(tmp_path):
    """As where Python is started in the folder from which pip has installed."""
    (tmp_path / "setup.py").touch()
    result = copied(tmp_path, None)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: wus_ext was imported from its sources, where it is not")


def test_the_core_needs_torch_only():
    extras = {
        *("lightning", "pytorch_lightning", "transformers", "accelerate", "timm"),
        *("torchvision", "sklearn", "matplotlib"),
        "torch._dynamo",  # slow to import
    }
    code = "import sys, wus_ext, wus_ext.distributed; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not extras & set(done.stdout.split())


def test_build_info():
    info = wus_ext.build_info()
    assert set(info) == {
        *("version", "python", "torch", "cpu_capability"),
        *("cuda", "cuda_archs", "without_cuda"),
    }
    assert info["version"] == wus_ext.__version__
    assert (info["cuda"] is None) == bool(info["without_cuda"])


def setup_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wus_ext_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module, on a torch built with CUDA 13.2 and with nothing in the environment."""
    for name in ("CUDA_HOME", "CUDA_PATH", "FORCE_CUDA", "FORCE_CPU", "MAX_JOBS", "WUS_INSTRUMENT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    return setup_module()


@pytest.mark.parametrize("version", ["65.5.0", "76.1"])
def test_an_old_setuptools_is_one_sentence(monkeypatch, version):
    monkeypatch.setattr(setuptools, "__version__", version)
    with pytest.raises(SystemExit) as left:
        setup_module()
    assert left.value.code == (
        f"wus_ext needs setuptools 77 or newer to build, and {version} is installed: "
        'pip install "setuptools>=77"'
    )


def test_an_unknown_instrument_is_one_sentence(monkeypatch):
    monkeypatch.setenv("WUS_INSTRUMENT", "memory")
    with pytest.raises(SystemExit, match="'memory' is none of address, thread, coverage"):
        setup_module()


def test_the_expected_time_follows_cores_and_files(build, monkeypatch, capsys):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.delenv("NINJA_STATUS", raising=False)
    build.announce(["csrc/a.cpp", "csrc/b.cpp"], 0)
    cpu = capsys.readouterr().out
    assert f"2 files to compile, some {build.CPU_SECONDS} s of processor time" in cpu
    assert "min on 4 cores" in cpu
    monkeypatch.setenv("MAX_JOBS", "1")
    build.announce(["csrc/a.cpp", "csrc/b.cu"], 3)
    both = capsys.readouterr().out
    assert f"some {build.CPU_SECONDS + 3 * build.CUDA_SECONDS} s" in both
    assert "min on 1 core," in both


def test_the_header_is_written_where_it_changed(build, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "ROOT", tmp_path)
    header = tmp_path / "build" / "generated" / "build_config.h"
    why = 'C:\\cuda: "nothing"'
    build.write_config({"cuda": None, "without_cuda": why})
    assert header.read_text() == '#define WUS_WITHOUT_CUDA "C:\\\\cuda: \\"nothing\\""\n'
    os.utime(header, (0, 0))
    build.write_config({"cuda": None, "without_cuda": why})
    assert header.stat().st_mtime == 0
    build.write_config({"cuda": "13.2"})
    assert header.read_text() == '#define WUS_CUDA "13.2"\n'


def test_supported_versions_agree():
    """What is asked for, checked and written about: the same oldest versions, and no newest."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    makefile, readme = (ROOT / "Makefile").read_text(), (ROOT / "README.md").read_text()
    assert project["project"]["requires-python"] == ">=3.11"
    assert "v >= (3, 11)" in makefile
    assert "torch>=2.11" in project["build-system"]["requires"]
    assert "TORCH ?= >=2.11\n" in makefile
    assert f"setuptools>={OLDEST_SETUPTOOLS}" in project["build-system"]["requires"]
    assert f"setuptools>={OLDEST_SETUPTOOLS}" in project["dependency-groups"]["dev"]
    for words in ("Python 3.11 or newer", "torch 2.11 or newer", '"torch>=2.11" "setuptools>=77"'):
        assert words in readme


def test_an_installation_asks_for_the_torch_that_it_was_built_for():
    requires = metadata.requires("wus_ext")
    assert f"torch=={wus_ext.build_info()['torch'].split('+')[0]}" in requires


def toolkit(home: Path, release: str = "13.2", without: str = "") -> Path:
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    for header in HEADERS:
        if header != without:
            (home / "include" / header).touch()
    return home


def test_a_complete_toolkit_is_used(build, tmp_path, monkeypatch, capsys):
    home = toolkit(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert build.find_cuda() == (home, None)
    assert f"building for CPU and CUDA with {home}" in capsys.readouterr().out
    monkeypatch.setenv("FORCE_CPU", "1")
    assert build.find_cuda() == (None, "FORCE_CPU=1")
    assert "building for CPU only (FORCE_CPU=1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        *[({"without": header}, f"no {header}") for header in HEADERS],
        ({"release": "12.8"}, "nvcc is CUDA 12, torch was built with 13.2"),
        ({"release": "?"}, "nvcc does not run"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_incomplete_toolkit_counts_as_none(
    build, tmp_path, monkeypatch, capsys, options, reason
):
    home = toolkit(tmp_path / "cuda", **options)
    monkeypatch.setattr(build, "toolkits", lambda: iter([tmp_path / "empty", home]))
    why = f"{tmp_path / 'empty'}: no nvcc; {home}: {reason}"
    assert build.find_cuda() == (None, why)
    assert f"building for CPU only ({why})" in capsys.readouterr().out


def test_force_cuda_without_a_toolkit_names_what_to_install(build, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_CUDA", "1")
    monkeypatch.setattr(build, "toolkits", lambda: iter([tmp_path]))
    with pytest.raises(SystemExit) as left:
        build.find_cuda()
    assert "\n" not in left.value.code
    assert f"no usable CUDA toolkit was found ({tmp_path}: no nvcc)" in left.value.code
    assert 'pip install "cuda-toolkit[nvcc,nvvm,crt,cccl,cudart]==13.2' in left.value.code
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(SystemExit, match="this torch has no CUDA"):
        build.find_cuda()


def test_the_environment_comes_first(build, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "path"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    homes = list(build.toolkits())
    assert homes[:2] == [tmp_path / "home", tmp_path / "path"]
    assert homes[-1].parts[-2:] == ("nvidia", "cu13")


def test_a_toolkit_that_cannot_be_run_is_a_reason(build, tmp_path):
    home = toolkit(tmp_path / "cuda")
    (home / "bin" / "nvcc").chmod(0o644)
    assert build.why_unusable(home) == "nvcc does not run"


def test_the_source_archive_is_complete(tmp_path):
    """Whatever is built, tested or read can be built, tested and read from the archive."""
    subprocess.run(
        [
            *(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)),
            *("sdist", "--dist-dir", str(tmp_path)),
        ],
        cwd=ROOT,
        env={**os.environ, "FORCE_CPU": "1"},
        check=True,
        capture_output=True,
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        inside = {str(Path(*Path(name).parts[1:])) for name in tar.getnames()}
    wanted = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "setup.py"]
    wanted += ["pyproject.toml", "conftest.py", ".clang-format", ".pre-commit-config.yaml"]
    for folder in (".ci", "benchmarks", "csrc", "docs", "tests", "wus_ext"):
        wanted += [
            str(path.relative_to(ROOT))
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and path.suffix not in (".pyc", ".so")
        ]
    assert len(wanted) > 200
    assert sorted(set(wanted) - inside) == []
    assert not [name for name in inside if name.endswith((".so", ".pyc"))]
