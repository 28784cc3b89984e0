import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from wus_ext import build_info
from wus_ext.cli import main
from wus_ext.training.config import TrainConfig
from wus_ext.training.trainer import Trainer

from . import tiny

pytest.importorskip("sklearn")

COMMAND = [sys.executable, "-m", "wus_ext"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
TINY = [
    *("--model", "alexnet", "--method", "wus", "--limit-train", "20", "--limit-test", "10"),
    *("--batch-size", "10", "--epochs", "3", "--warmup", "1", "--patience", "1"),
    *("--threshold", "100"),
]


@pytest.fixture
def small(monkeypatch):
    original = Trainer.__init__

    def init(self, config, **options):
        original(self, config, data=tiny.data(), build=tiny.build, **options)

    monkeypatch.setattr(Trainer, "__init__", init)


@pytest.mark.parametrize("command", [[], ["train"], ["compare"], ["info"]], ids=" ".join)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*command, "--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    if command in (["train"], ["compare"]):
        documented = set(re.findall(r"--[a-z-]+", out))
        skipped = {"model", "method", "seed", "early_stop"} if command == ["compare"] else set()
        fields = set(TrainConfig.__dataclass_fields__) - skipped
        assert {f"--{name.replace('_', '-')}" for name in fields} <= documented


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --model lenet", "lenet"),
        ("train --epochs -3", "epochs must be at least 1, got -3"),
        ("train --epochs many", "many"),
        ("train --lr 0", "lr must be positive"),
        ("train --resume", "--resume needs --out"),
        ("train --resume --out nowhere", "no run to resume in nowhere"),
        ("train --dataset folder --data-dir nowhere", "no such folder: nowhere"),
        ("train --dataset cifar10 --no-download --data-dir x", "no copy of cifar10 in x"),
        ("train --limit-train 3", "limit_train must be at least the number of classes"),
        ("train --device cuda:99", "not present"),
        ("compare --seeds 0", "seeds must be at least 1"),
        ("compare --models vgg11 vgg11", "different names"),
        ("compare --resume --out nowhere", "no comparison to resume"),
        ("compare --schedule constant", "needs the schedule"),
        ("dance", "dance"),
    ],
)
def test_bad_arguments_give_one_sentence_and_code_2(
    arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments.split())
    except SystemExit as exit:
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_train_prints_plain_lines_without_a_terminal(capsys, tmp_path, small):
    assert main(["train", *TINY, "--out", str(tmp_path / "run")]) == 0
    captured = capsys.readouterr()
    assert "\r" not in captured.out + captured.err
    lines = captured.out.splitlines()
    assert [line.partition("  ")[0] for line in lines[:3]] == [f"epoch {i}/3" for i in (1, 2, 3)]
    assert [line.rpartition(" ")[2] for line in lines[:3]] == ["trained", "trained", "skipped"]
    assert lines[3].startswith("done: test accuracy")


def test_an_interrupt_says_how_to_go_on(capsys, tmp_path, small, monkeypatch):
    original = Trainer.run_epoch

    def run_epoch(self):
        if self.history:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(Trainer, "run_epoch", run_epoch)
    out = str(tmp_path / "my run")
    assert main(["train", *TINY, "--out", out]) == 130
    error = capsys.readouterr().err
    assert f"continue with: wus-ext train --resume --out '{out}'" in error
    monkeypatch.setattr(Trainer, "run_epoch", original)
    assert main(["train", "--resume", "--out", out]) == 0
    assert main(["train", "--resume", "--out", out, "--lr", "0.5", "--epochs", "9"]) == 2
    assert "cannot resume" in (error := capsys.readouterr().err)
    assert "lr is None there, 0.5 here" in error


def test_a_diverged_training_is_code_1(capsys, tmp_path):
    arguments = [*TINY, "--lr", "1e30", "--out", str(tmp_path / "run")]
    assert main(["train", *arguments]) == 1
    assert "use a lower --lr" in capsys.readouterr().err


def test_info_says_what_it_runs_on(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    build = build_info()
    assert f"torch: {torch.__version__}\n" in out
    assert f"CPU kernels: {build['cpu_capability']}\n" in out
    assert f"CUDA part: {build['cuda'] or 'not built: ' + build['without_cuda']}" in out
    assert "here: " in out
    assert "transformed weights in a skip window" in out


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run = [*COMMAND, "train", *TINY, "--epochs", "4"]
    subprocess.run([*run, "--out", str(whole)], check=True, env=ONE_THREAD, capture_output=True)
    with subprocess.Popen(
        [*run, "--out", str(killed)], env=ONE_THREAD, stdout=subprocess.PIPE
    ) as process:
        # Within the third epoch, which skips.
        assert any(line.startswith(b"epoch 2/4") for line in process.stdout)
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    before = torch.load(killed / "last.pt", weights_only=True)["epoch"]
    assert 2 <= before < 4
    again = [*COMMAND, "train", "--resume", "--out", str(killed)]
    subprocess.run(again, check=True, env=ONE_THREAD, capture_output=True)
    states = [torch.load(path / "last.pt", weights_only=True) for path in (whole, killed)]
    assert [state["epoch"] for state in states] == [4, 4]
    assert any(record["skipped"] for record in states[0]["history"])
    for name, tensor in states[0]["model"].items():
        assert torch.equal(tensor, states[1]["model"][name]), name
