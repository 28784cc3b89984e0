"""A tree of images: what counts, what does not, and that nothing is left out in silence."""

import os
import socket
import warnings

import pytest
import torch

from wus_ext.training import DataError, RunWarning, Trainer, load_data
from wus_ext.training.folder import scan_folder

from . import tiny
from .rights import without_override
from .test_data import batches
from .tiny import folder_config

Image = pytest.importorskip("PIL.Image")


def test_folder_in_memory_and_from_files_give_the_same_batches(tree):
    memory = load_data(folder_config(tree))
    files = load_data(folder_config(tree, memory_budget=0.0, workers=0))
    assert type(memory.train).__name__ == "MemorySplit"
    assert type(files.train).__name__ == "FileSplit"
    assert memory.classes == files.classes == ["cat", "dog"]
    assert memory.flip
    for (images, labels), (other, other_labels) in zip(
        batches(memory, 1), batches(files, 1), strict=True
    ):
        assert torch.equal(images, other)
        assert torch.equal(labels, other_labels)


def test_folder_with_worker_processes(tree):
    data = load_data(folder_config(tree, memory_budget=0.0, workers=1))
    images, labels = next(iter(data.evaluation_batches(data.test, 8)))
    assert images.shape == (4, 3, 32, 32)
    assert labels.tolist() == [0, 0, 1, 1]


def remove(path):
    for entry in path.rglob("*"):
        if entry.is_file():
            entry.unlink()
    for entry in sorted(path.rglob("*"), reverse=True):
        entry.rmdir()
    path.rmdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tree: remove(tree), "no such folder"),
        (lambda tree: remove(tree / "test"), "has no test folder"),
        (lambda tree: remove(tree / "train"), "has no train folder"),
        (lambda tree: [remove(tree / "train" / c) for c in ("cat", "dog")], "no class folders"),
        (lambda tree: [f.unlink() for f in (tree / "train/dog").iterdir()], "train/dog has no ima"),
        (lambda tree: (tree / "test/dog").rename(tree / "test/cow"), "cow, dog are in only one"),
        (lambda tree: [remove(tree / p / "dog") for p in ("train", "test")], "only the class cat"),
        (lambda tree: (tree / "train/cat/0.png").write_text("no"), r"cannot read .*cat/0\.png"),
    ],
    ids=["root", "test", "train", "classes", "empty", "mismatch", "one", "unreadable"],
)
def test_a_bad_folder_gives_one_clear_error(tree, damage, message):
    damage(tree)
    with pytest.raises(DataError, match=message):
        load_data(folder_config(tree))


def test_hidden_files_are_ignored(tree):
    (tree / "train/.cache").mkdir()
    (tree / "train/cat/.DS_Store").write_text("")
    train, _, classes = scan_folder(tree)
    assert (len(train), classes) == (12, ["cat", "dog"])


def link_to_nothing(tree):
    (tree / "train/cat/broken.png").symlink_to("nothing")
    return "train", "cat/broken.png (a link to nothing)"


def link_to_itself(tree):
    (tree / "train/cat/loop.png").symlink_to("loop.png")
    return "train", "cat/loop.png (a link to nothing)"


def fifo(tree):
    os.mkfifo(tree / "test/dog/pipe")
    return "test", "dog/pipe (a FIFO)"


def link_to_a_fifo(tree):
    os.mkfifo(tree / "pipe")
    (tree / "test/dog/pipe").symlink_to(tree / "pipe")
    return "test", "dog/pipe (a FIFO)"


def nested(tree):
    (tree / "train/dog/more/deeper").mkdir(parents=True)
    (tree / "train/dog/more/1.png").touch()
    (tree / "train/dog/more/deeper/2.png").touch()
    return "train", "dog/more (a folder with 2 files)"


def beside_the_classes(tree):
    (tree / "train/0.png").touch()
    return "train", "0.png (a file)"


def a_socket(tree):
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(tree / "train/cat")
        server.bind("socket")
    return "train", "cat/socket (a socket)"


@pytest.mark.parametrize(
    "add",
    [link_to_nothing, link_to_itself, fifo, link_to_a_fifo, nested, beside_the_classes, a_socket],
)
def test_what_is_left_out_is_counted_and_named(tree, add, monkeypatch):
    monkeypatch.chdir(tree)
    part, named = add(tree)
    message = f"1 entry is no <class>/<image> in {tree / part}, and left out: {named}"
    with pytest.warns(RunWarning) as caught:
        train, test, _ = scan_folder(tree)
    assert [str(warning.message) for warning in caught] == [message]
    assert (len(train), len(test)) == (12, 4)


def test_of_many_the_first_are_named(tree):
    for index in range(9):
        (tree / f"train/cat/{index}.jpg").symlink_to("nothing")
    with pytest.warns(RunWarning, match=r"9 entries are no .*cat/4\.jpg \(.*\) and 4 more$"):
        scan_folder(tree)


def test_links_to_images_and_to_classes_count(tree):
    (tree / "train/cat/link.png").symlink_to(tree / "train/dog/0.png")
    (tree / "classes").mkdir()
    for part in ("train", "test"):
        (tree / part / "dog").rename(tree / "classes" / part)
        (tree / part / "dog").symlink_to(tree / "classes" / part)
    (tree / "train/cat/link.png").unlink()
    (tree / "train/cat/link.png").symlink_to(tree / "train/dog/0.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, test, classes = scan_folder(tree)
    assert (len(train), len(test), classes) == (13, 4, ["cat", "dog"])


def test_a_class_of_nothing_but_other_things_says_what_they_are(tree):
    for image in (tree / "train/dog").iterdir():
        image.unlink()
    nested(tree)
    with pytest.raises(DataError, match=r"has no images, only dog/more \(a folder with 2 files\)"):
        load_data(folder_config(tree))


@pytest.mark.parametrize("path", ["train", "train/cat", "test/dog"])
def test_a_folder_that_may_not_be_read_is_named(tree, path):
    (tree / path).chmod(0)
    try:
        with (
            without_override(),
            pytest.raises(DataError, match=rf"cannot read .*{path}: Permission denied"),
        ):
            load_data(folder_config(tree))
    finally:
        (tree / path).chmod(0o755)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_that_workers_meet_is_named_in_one_line(tree, workers):
    data = load_data(folder_config(tree, memory_budget=0.0, workers=workers))
    (tree / "test/dog/1.png").write_text("no image")
    with pytest.raises(DataError, match=r"cannot read .*test/dog/1\.png as an image: ") as caught:
        list(data.evaluation_batches(data.test, 2))
    assert "\n" not in str(caught.value)


def test_a_run_says_what_is_left_out(tree, capsys):
    from wus_ext.cli import main

    link_to_nothing(tree)
    arguments = ["train", "--dataset", "folder", "--data-dir", str(tree), "--model", "resnet18"]
    assert main([*arguments, "--epochs", "1", "--out", str(tree / "run")]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("images: folder, 12 for training, 4 for test, 2 classes; 32x32 ")
    warning, *more = captured.err.splitlines()
    assert warning.startswith("wus-ext train: warning: 1 entry is no <class>/<image> in ")
    assert not [line for line in more if "entry is" in line]


def test_only_the_first_process_says_it(tree, monkeypatch):
    link_to_nothing(tree)
    monkeypatch.setattr("wus_ext.distributed.processes.from_first", lambda make: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = folder_config(tree, device="cpu", batch_size=4)
        run = Trainer(config, build=tiny.build)
    assert torch.bincount(run.data.train.labels).tolist() == [6, 6]
