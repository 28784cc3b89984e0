"""``wus-ext train`` under torchrun: the same weights, killed or not."""

from __future__ import annotations

import re
import signal
import subprocess
import time

import pytest
import torch

from .test_distributed import QUIET, ROOT, TORCHRUN

pytest.importorskip("sklearn")

TRAIN = [*TORCHRUN, "2", "-m", "wus_ext", "train"]
TINY = [
    *("--model", "alexnet", "--method", "wus", "--limit-train", "20", "--limit-test", "10"),
    *("--batch-size", "5", "--epochs", "4", "--warmup", "1", "--patience", "1"),
    *("--threshold", "100", "--device", "cpu"),
]
OPTIONS = {"cwd": ROOT, "env": QUIET, "text": True}


def run(*arguments, code=0):
    done = subprocess.run(
        [*TRAIN, *map(str, arguments)], capture_output=True, timeout=120, **OPTIONS
    )
    assert done.returncode == code, done.stderr
    return done


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    lines = run(*TINY, "--out", whole).stdout.splitlines()
    assert [line[:9] for line in lines] == [*(f"epoch {n}/4" for n in (1, 2, 3, 4)), "done: tes"]
    with subprocess.Popen(
        [*TRAIN, *TINY, "--out", str(killed)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **OPTIONS,
    ) as process:
        # Within the third epoch, which skips: two lines are out, the third is not.
        process.stdout.readline(), process.stdout.readline()
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode != 0
    before = torch.load(killed / "last.pt", weights_only=True)["epoch"]
    assert 2 <= before < 4
    run("--resume", "--out", killed)
    states = [torch.load(path / "last.pt", weights_only=True) for path in (whole, killed)]
    assert [state["epoch"] for state in states] == [4, 4]
    assert any(record["skipped"] for record in states[0]["history"])
    for name, tensor in states[0]["model"].items():
        assert torch.equal(tensor, states[1]["model"][name]), name


def test_an_error_is_said_once(tmp_path):
    (tmp_path / "note.txt").touch()
    done = run(*TINY, "--out", tmp_path, code=1)
    said = re.findall(r"wus-ext train.*: error: .*exists and is no run", done.stderr)
    assert len(said) == 1, done.stderr
