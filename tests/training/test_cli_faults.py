"""What goes wrong while the command runs: one line, the right exit code, nothing lost."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch

from wus_ext.cli import main
from wus_ext.training import RunWarning, Trainer, load_checkpoint
from wus_ext.training.runfolder import RunFolder

from .command import SETTINGS, patched
from .rights import without_override
from .run_folders import fails_for, flip, largest_file, snapshot
from .test_lock import held_by_another

COMMAND = [sys.executable, "-m", "tests.training.command"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def train(monkeypatch, capsys):
    """Runs ``wus-ext train``; returns its exit code and the lines of its errors."""
    patched(monkeypatch)

    def run(*arguments):
        code = main(["train", *map(str, arguments)])
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return code, error.splitlines()

    return run


@pytest.fixture
def run(train, tmp_path, monkeypatch):
    """A run that was interrupted after two epochs of four."""
    folder, original = tmp_path / "run", Trainer.run_epoch

    def run_epoch(self):
        if len(self.history) == 2:
            raise KeyboardInterrupt
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_epoch", run_epoch)
        assert train(*SETTINGS, "--out", folder)[0] == 130
    return folder


def epochs(folder):
    return [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").open()]


def start(*arguments, **options):
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path):
    folder = tmp_path / "run"
    endless = [*SETTINGS, "--epochs", "100000"]
    with start("train", *endless, "--out", folder) as first:
        assert first.stdout.readline().startswith("epoch ")
        for arguments in (["--resume"], endless):
            with start("train", *arguments, "--out", folder) as second:
                _, error = second.communicate(timeout=60)
            assert second.returncode == 2
            assert error.count("\n") == 1
            assert re.search("is in use by another run|already holds a run", error)
        assert f"process {first.pid} on " in (folder / ".lock").read_text()
        first.send_signal(signal.SIGKILL)
        first.communicate()
    with start("train", "--resume", "--out", folder) as third:
        assert third.stdout.readline().startswith("epoch ")
        time.sleep(0.2)
        third.send_signal(signal.SIGINT)
        _, error = third.communicate(timeout=60)
    assert third.returncode == 130
    assert error == f"\ninterrupted; continue with: wus-ext train --resume --out {folder}\n"
    assert epochs(folder) == list(range(1, load_checkpoint(folder / "last.pt")["epoch"] + 1))


INTERRUPTED = """
import io, os, signal, sys
from tests.training import command
from wus_ext.training import checkpoint

class Interrupted(io.BytesIO):
    def write(self, data):
        os.kill(os.getpid(), signal.SIGINT)
        return super().write(data)

checkpoint.io.BytesIO = Interrupted
command.patched()
sys.exit(command.main(sys.argv[1:]))
"""


def test_an_interrupt_inside_a_checkpoint_write_is_130_and_says_how_to_go_on(tmp_path):
    folder = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, "train", *SETTINGS, "--out", str(folder)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 130
    assert done.stderr == f"\ninterrupted; continue with: wus-ext train --resume --out {folder}\n"
    assert load_checkpoint(folder / "last.pt")["epoch"] == 1
    assert epochs(folder) == [1]


@pytest.mark.parametrize("when", ["open", "begin", "finish"])
def test_an_interrupt_at_any_other_time_is_130(train, tmp_path, monkeypatch, when):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, when, interrupted)
    code, error = train(*SETTINGS, "--epochs", 1, "--out", tmp_path / "run")
    assert code == 130
    assert error[-1].startswith("interrupted; " if when == "finish" else "interrupted; before")


def test_a_full_disk_says_what_is_kept_and_resumes(train, run):
    with largest_file(2000):
        code, error = train("--resume", "--out", run)
    assert code == 1
    assert error == [
        f"wus-ext train: error: cannot write {run}/last.pt: File too large; {run}/last.pt keeps "
        "epoch 2, continue with --resume"
    ]
    assert train("--resume", "--out", run)[0] == 0
    assert epochs(run) == [1, 2, 3, 4]


def test_a_disk_that_is_full_from_the_beginning(train, tmp_path):
    with largest_file(100):
        code, (error,) = train(*SETTINGS, "--out", tmp_path / "run")
    assert code == 1
    assert f"cannot write {tmp_path}/run/config.json: File too large" in error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_may_not_be_written_to(train, run, tmp_path):
    before = snapshot(run)
    for path in (run, tmp_path):
        path.chmod(0o555)
    with without_override():
        resumed = train("--resume", "--out", run)
        new = train(*SETTINGS, "--out", tmp_path / "new")
    for path in (run, tmp_path):
        path.chmod(0o755)
    for (code, error), folder in ((resumed, run), (new, tmp_path / "new")):
        assert code == 2
        assert error == [
            f"wus-ext train: error: cannot write to {folder} (Permission denied): choose another "
            "--out"
        ]
    assert snapshot(run) == before


@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["new", "resume"])
@pytest.mark.parametrize("kind", ["locked away", "long", "below a file"])
def test_a_folder_that_cannot_be_is_refused(tmp_path, capsys, command, resume, kind):
    (tmp_path / "locked").mkdir(mode=0o444)
    (tmp_path / "file").touch()
    paths = {"locked away": "locked/run", "long": "x" * 300, "below a file": "file/run"}
    out = tmp_path / paths[kind]
    with without_override():
        assert main([command, *resume, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    reason = {"locked away": "Permission denied", "long": "File name too long"}.get(kind, "")
    assert f"wus-ext {command}: error: " in error
    assert str(out) in error
    assert reason in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "locked"]


@pytest.mark.parametrize("dataset", ["folder", "cifar10", "cifar100"])
def test_data_that_may_not_be_read_are_named(tmp_path, capsys, dataset):
    (tmp_path / "data").mkdir(mode=0o444)
    place = tmp_path / "data" / "images"
    arguments = ["--dataset", dataset, "--data-dir", str(place), "--out", str(tmp_path / "run")]
    with without_override():
        assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search("error: cannot read .*: Permission denied", error)
    assert str(place) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_that_becomes_read_only_in_between(train, run, monkeypatch):
    fails_for("last.pt", monkeypatch, errno.EROFS)
    code, (error,) = train("--resume", "--out", run)
    assert code == 1
    assert "last.pt: Read-only file system; " in error
    assert "keeps epoch 2" in error


@pytest.mark.parametrize("name", ["batch-size", "epochs", "seed", "limit-train", "workers"])
def test_a_number_beyond_64_bits_is_refused_and_leaves_nothing(train, tmp_path, name):
    option = f"--{name}"
    code, (error,) = train(*SETTINGS, option, 2**63, "--out", tmp_path / "run")
    assert code == 2
    assert f"{name.replace('-', '_')} must fit into 64 bits, got {2**63}" in error
    assert list(tmp_path.iterdir()) == []


def test_the_largest_batch_size_is_all_images(train, tmp_path):
    assert train(*SETTINGS, "--batch-size", 2**63 - 1, "--out", tmp_path / "run")[0] == 0


def test_a_run_that_stored_no_epoch_is_not_in_the_way_of_the_next(train, tmp_path):
    code, (error,) = train(*SETTINGS, "--lr", "1e30", "--out", tmp_path / "run")
    assert code == 1
    assert "use a lower --lr" in error
    assert list(tmp_path.iterdir()) == []
    assert train(*SETTINGS, "--out", tmp_path / "run")[0] == 0


def test_a_run_that_fails_later_is_kept(train, run, monkeypatch):
    def fail(self):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "images/0.png")

    monkeypatch.setattr(Trainer, "run_epoch", fail)
    before = snapshot(run)
    code, error = train("--resume", "--out", run)
    assert code == 1
    assert error == ["wus-ext train: error: [Errno 5] Input/output error: 'images/0.png'"]
    assert snapshot(run) == before


def allocate(run):
    torch.empty(2**50)


def allocate_on_a_gpu(run):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")


def lose_a_worker(run):
    raise RuntimeError("DataLoader worker (pid 9) is killed by signal: Killed. ")


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (allocate, "out of memory: use a smaller --batch-size (["),
        (allocate_on_a_gpu, "out of memory: use a smaller --batch-size (CUDA out of memory. Tried"),
        (lose_a_worker, "Use fewer --workers (DataLoader worker (pid 9) is killed"),
    ],
)
def test_a_lack_of_memory_is_no_traceback(train, run, monkeypatch, fail, message):
    monkeypatch.setattr(Trainer, "run_epoch", fail)
    code, (error,) = train("--resume", "--out", run)
    assert code == 1
    assert message in error


def test_a_fault_of_the_program_still_is_one(train, run, monkeypatch):
    monkeypatch.setattr(Trainer, "run_epoch", lambda run: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        train("--resume", "--out", run)


def test_damage_is_said_and_what_it_says_works(train, run):
    flip(run / "last.pt")
    code, (error,) = train("--resume", "--out", run)
    assert code == 2
    assert f"{run}/last.pt is damaged: its checksum is wrong; {run}/previous.pt is whole" in error
    subprocess.run(error.rpartition(": ")[2], shell=True, check=True)
    code, error = train("--resume", "--out", run)
    assert code == 0
    assert error == [
        f"wus-ext train: warning: {run}/metrics.jsonl did not agree with {run}/last.pt: written "
        "anew from it"
    ]
    assert epochs(run) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "train_gamma",
            "no",
            "config.json is not readable: train_gamma must be true or false, got",
        ),
        ("lr", 0.5, r"lr is 0.5 in .*config.json, 0.05 in .*last.pt"),
        ("seed", 5, r"seed is 5 in .*config.json, 0 in .*last.pt"),
        ("epochs", 9, "epochs is 4 there, 9 here, and the learning rates of schedule .cosine."),
        ("model", "resnet18", "model is 'resnet18' in .*config.json, 'vgg11' in .*last.pt"),
    ],
)
def test_edited_settings_are_refused(train, run, name, value, message):
    content = json.loads((run / "config.json").read_text())
    content["config"][name] = value
    (run / "config.json").write_text(json.dumps(content))
    before = snapshot(run)
    code, (error,) = train("--resume", "--out", run)
    assert code == 2
    assert re.search(message, error)
    assert snapshot(run) == before


def test_output_that_nobody_reads_ends_the_run_in_one_line(tmp_path):
    with start("train", *SETTINGS, "--out", tmp_path / "run") as process:
        process.stdout.close()
        error = process.stderr.read()
    assert process.returncode == 1
    assert error == "wus-ext train: error: [Errno 32] Broken pipe\n"
    with start("train", "--resume", "--out", tmp_path / "run") as process:
        process.communicate()
    assert process.returncode == 0


def test_two_comparisons_do_not_share_a_folder(train, tmp_path, capsys):
    with held_by_another(tmp_path):
        assert main(["compare", *SETTINGS[2:], "--out", str(tmp_path)]) == 2
    assert "is in use by another run" in capsys.readouterr().err


def test_warnings_of_others_are_shown_as_ever(train, tmp_path, monkeypatch):
    def warn(self, *arguments, **options):
        warnings.warn("something else", DeprecationWarning, stacklevel=1)
        warnings.warn("look here", RunWarning, stacklevel=1)

    monkeypatch.setattr(RunFolder, "begin", warn)
    with pytest.warns(DeprecationWarning, match="something else"):
        _, error = train(*SETTINGS, "--epochs", 1, "--out", tmp_path / "run")
    assert "wus-ext train: warning: look here" in error
