"""Two real processes, started once by torchrun, run every check; each is a test here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from .worker import CHECKS

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
QUIET = {**os.environ, "OMP_NUM_THREADS": "1"}


def launch(folder: Path, count: int = 2, **environment: str) -> dict[str, list[str]]:
    """Runs all checks; returns for each the tracebacks of the processes, empty where it passed."""
    done = subprocess.run(
        [*TORCHRUN, str(count), "-m", "tests.distributed.worker", str(folder)],
        cwd=ROOT,
        env={**QUIET, "TMPDIR": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    files = [folder / f"{rank}.json" for rank in range(count)]
    if not all(file.exists() for file in files):
        pytest.fail(f"torchrun failed:\n{done.stdout}\n{done.stderr}")
    each = [json.loads(file.read_text()) for file in files]
    unfinished = f"did not finish:\n{done.stderr[-4000:]}"
    return {name: [outcome.get(name, unfinished) for outcome in each] for name in CHECKS}


@pytest.fixture(scope="module")
def gloo(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("gloo"))


@pytest.fixture(scope="module")
def nccl(tmp_path_factory):
    # One GPU will do for one process: no traffic, but all of the device's code.
    count = min(2, torch.cuda.device_count())
    return launch(tmp_path_factory.mktemp("nccl"), count, BACKEND="cpu:gloo,cuda:nccl")


def report(outcomes: list[str]) -> None:
    failed = [f"process {rank}: {text}" for rank, text in enumerate(outcomes) if text]
    if failed:
        pytest.fail("\n".join(failed), pytrace=False)


@pytest.mark.parametrize("name", CHECKS, ids=lambda name: name.removeprefix("check_"))
def test_gloo(gloo, name):
    report(gloo[name])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CHECKS, ids=lambda name: name.removeprefix("check_"))
def test_nccl(nccl, name):
    report(nccl[name])
