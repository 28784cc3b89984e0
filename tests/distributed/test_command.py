"""``wus-ext train`` under torchrun: the same weights, killed or not."""

from __future__ import annotations

import re
import signal
import subprocess
import time

import pytest
import torch

from wus_ext.cli import main

from .test_distributed import QUIET, ROOT, TORCHRUN

pytest.importorskip("sklearn")

TRAIN = [*TORCHRUN, "2", "-m", "wus_ext", "train"]
TINY = [
    *("--model", "alexnet", "--method", "wus", "--limit-train", "20", "--limit-test", "10"),
    *("--batch-size", "5", "--epochs", "6", "--warmup", "1", "--patience", "1"),
    *("--threshold", "100", "--device", "cpu", "--dropout", "0"),
    # By itself the engine chooses by the batch's size, which is another for one process.
    *("--algo", "f2"),
]
OPTIONS = {"cwd": ROOT, "env": QUIET, "text": True}


def run(*arguments, code=0, command=TRAIN):
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, timeout=120, **OPTIONS
    )
    assert done.returncode == code, done.stderr
    return done


def test_a_killed_run_resumes_to_the_weights_of_one_process_with_the_doubled_batch(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["train", *TINY, "--batch-size", "10", "--out", str(one)]) == 0
    with subprocess.Popen(
        [*TRAIN, *TINY, "--out", str(two)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **OPTIONS,
    ) as process:
        # Within the third epoch, which skips.
        assert any(line.startswith("epoch 2/6") for line in process.stdout)
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode != 0
    first = torch.load(two / "best.pt", weights_only=True)
    assert 2 <= torch.load(two / "last.pt", weights_only=True)["epoch"] < 6
    lines = run("--resume", "--out", two).stdout.splitlines()
    assert [line[:9] for line in lines][-2:] == ["epoch 6/6", "done: tes"]
    states = [torch.load(path / "last.pt", weights_only=True) for path in (one, two)]
    assert [state["epoch"] for state in states] == [6, 6]
    assert any(record["skipped"] for record in states[0]["history"])
    expected, trained, before = (
        torch.cat([tensor.flatten() for tensor in state["model"].values()])
        for state in (*states, first)
    )
    assert (trained - expected).norm() < 1e-4 * (expected - before).norm()


def test_an_error_is_said_once(tmp_path):
    (tmp_path / "note.txt").touch()
    done = run(*TINY, "--out", tmp_path, code=1)
    said = re.findall(r"wus-ext train.*: error: .*exists and is no run", done.stderr)
    assert len(said) == 1, done.stderr


def test_no_thread_of_the_group_is_left_when_the_interpreter_ends():
    run(command=[*TORCHRUN, "2", "-m", "tests.distributed.leaving"])
