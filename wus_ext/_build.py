"""Loads the compiled half, or says in one sentence why it cannot."""

from __future__ import annotations

import importlib
import platform
from pathlib import Path
from typing import Any

import torch

from ._version import __version__

_REBUILD = "rebuild it with: pip install --no-build-isolation --force-reinstall --no-deps ."


def _load() -> Any:
    try:
        _C = importlib.import_module(f"{__package__}._C")
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}._C":
            raise
        if (Path(__file__).parents[1] / "setup.py").exists():
            raise ImportError(
                "wus_ext was imported from its sources, where it is not built; start Python in "
                "another folder if it is installed, or build it here: "
                "python setup.py build_ext --inplace"
            ) from None
        raise ImportError(f"wus_ext is not built for this Python; {_REBUILD}") from None
    except ImportError as error:
        # Another torch shows as an undefined symbol or a missing library.
        raise ImportError(
            f"wus_ext was built for another torch than the installed {torch.__version__} "
            f"({error}); {_REBUILD}"
        ) from None
    built_for = _C.build_info()["torch"]
    if built_for.split("+")[0] != torch.__version__.split("+")[0]:
        raise ImportError(
            f"wus_ext was built for torch {built_for}, but torch {torch.__version__} is "
            f"installed; {_REBUILD}"
        )
    return _C


_C = _load()

#: Sessions in which layers defer: csrc/deferral.
deferral = _C.deferral
#: Chains of layers as autograd functions: csrc/chains.
chains = _C.chains


def build_info() -> dict[str, Any]:
    """What this installation was built for and runs on.

    Returns:
        A dict with ``version`` (of wus_ext), ``torch`` (the version built against), ``cuda`` (the
        toolkit's version, or None for a CPU-only build), ``without_cuda`` (why it is one, or
        None), ``cuda_archs`` (or None), ``python`` and ``cpu_capability`` (the vector
        instructions in use: ``avx512``, ``avx2`` or ``generic``).

    Example:
        >>> wus_ext.build_info()["cpu_capability"] in ("avx512", "avx2", "generic")
        True
    """
    return {
        "version": __version__,
        "python": platform.python_version(),
        **_C.build_info(),
    }
