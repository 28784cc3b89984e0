"""Builds the API reference from the docstrings: python docs/reference.py [FOLDER].

It shows what is public, and a warning is an error.
"""

from __future__ import annotations

import argparse
import importlib
import warnings
from pathlib import Path

#: The public modules; of each, the names in its ``__all__``.
MODULES = (
    "wus_ext",
    "wus_ext.nn",
    "wus_ext.functional",
    "wus_ext.models",
    "wus_ext.distributed",
    "wus_ext.methods.rules",
    "wus_ext.profiling",
    "wus_ext.training",
    "wus_ext.integrations.lightning",
    "wus_ext.integrations.transformers",
)


def build(folder: Path) -> None:
    """Writes the pages, with ``index.html`` as the first."""
    import pdoc

    for name in MODULES:  # what other packages warn of when they are imported is not ours
        importlib.import_module(name)
    pdoc.render.configure(docformat="google", show_source=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Each module, and not those inside it.
        specifications = [part for name in MODULES for part in (name, rf"!{name}\..+")]
        pdoc.pdoc(*specifications, output_directory=folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/docs"))
    folder = parser.parse_args().folder
    build(folder)
    print(folder / "index.html")
