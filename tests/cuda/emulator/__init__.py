"""The CUDA kernels and their launchers without a GPU: compiled by g++, run on the CPU.

Threads of a block are fibers that really wait at barriers, in an order that changes from one
barrier to the next; blocks run one after the other. What this cannot show is speed, and races
between warps that a barrier happens to order here.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

import wus_ext  # noqa: F401  (registers torch.ops.wus, whose schemas are taken)

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
FLAGS = ["-x", "c++", "-O1", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden", "-w"]
#: Of the emulated operators.
NAMESPACE = "wus_emulated"
SANITIZE = ["-g", "-fsanitize=address"]


def compile_kernels() -> Path:
    """The shared library, made anew when a source has changed."""
    flags = [*FLAGS, *(SANITIZE if os.environ.get("WUS_SANITIZE") == "1" else [])]
    sources = [path for folder in (HERE, ROOT / "csrc") for path in sorted(folder.rglob("*"))]
    contents = [path.read_bytes() for path in sources if path.is_file() and path.suffix != ".pyc"]
    key = hashlib.sha256(b"\0".join([torch.__version__.encode(), *map(str.encode, flags)]))
    for content in contents:
        key.update(content)
    library = ROOT / "build" / "emulator" / f"{key.hexdigest()[:16]}.so"
    if not library.exists():
        torch_root = Path(torch.__file__).parent
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        includes = [HERE, ROOT / "csrc", torch_root / "include"]
        subprocess.run(
            [
                *os.environ.get("CXX", "g++").split(),
                *flags,
                *(f"-I{folder}" for folder in includes),
                str(HERE / "emulator.cpp"),
                f"-L{torch_root / 'lib'}",
                "-ltorch_cpu",
                "-lc10",
                *("-o", str(unfinished)),
            ],
            check=True,
        )
        unfinished.rename(library)
    return library


@cache
def load() -> Any:
    """``torch.ops.wus_emulated``: the operators that have a CUDA kernel, for tensors on the CPU."""
    library = torch.library.Library(NAMESPACE, "DEF")
    load.library = library  # keeps the schemas alive
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("wus::"):
            library.define(str(schema).replace("wus::", "", 1))
    torch.ops.load_library(compile_kernels())
    return torch.ops.wus_emulated
