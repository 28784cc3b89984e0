"""Files are the old ones or the new ones, and a damaged one is never taken for a whole one."""

import errno
import os
import zipfile

import pytest
import torch

from wus_ext.training import DataError, StorageError, load_checkpoint
from wus_ext.training.checkpoint import pack_checkpoint, write_checkpoint
from wus_ext.training.files import link_atomic, write_atomic

STATE = {"weight": torch.arange(100.0).view(10, 10), "epoch": 3, "names": ["a", "b"], "none": None}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "last.pt"
    write_checkpoint(path, pack_checkpoint(STATE))
    return path


def flipped(content, place, bit=0):
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


# Checkpoints


def test_a_checkpoint_is_a_file_of_torch_with_a_checksum(path):
    for state in (load_checkpoint(path), torch.load(path, weights_only=True)):
        assert torch.equal(state["weight"], STATE["weight"])
        assert {name: state[name] for name in ("epoch", "names", "none")} == {
            name: STATE[name] for name in ("epoch", "names", "none")
        }
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"wus_ext sha256 ")


def test_a_flip_of_any_bit_is_caught(path):
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(flipped(content, place, place % 8))
        with pytest.raises(DataError, match=r"last\.pt is (damaged|not a readable checkpoint)"):
            load_checkpoint(path)


@pytest.mark.parametrize("cut", [1, 20, 81, 100, 1000])
def test_a_file_that_is_cut_off_or_goes_on_is_caught(path, cut):
    content = path.read_bytes()
    for changed in (content[:-cut], content + bytes(cut), content[:-cut] + bytes(cut)):
        path.write_bytes(changed)
        with pytest.raises(DataError, match=r"last\.pt is (damaged|not a readable checkpoint)"):
            load_checkpoint(path)


def test_a_file_of_torch_alone_is_read_and_its_values_are_verified(path):
    torch.save(STATE, path)
    assert torch.equal(load_checkpoint(path)["weight"], STATE["weight"])
    content = path.read_bytes()
    values = content.index(STATE["weight"].numpy().tobytes())
    for place in (values, values + 399):
        path.write_bytes(flipped(content, place))
        with pytest.raises(DataError, match=r"last\.pt is damaged: its checksum is wrong"):
            load_checkpoint(path)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "is missing"),
        (lambda path: path.mkdir(), "is no file"),
        (lambda path: os.mkfifo(path), "is no file"),
        (lambda path: path.write_bytes(b""), "is not a readable checkpoint: it is no archive"),
        (lambda path: path.write_bytes(b"PK"), "is not a readable checkpoint: it is no archive"),
        (lambda path: path.write_text("hello" * 99), "is not a readable checkpoint: it is no arc"),
        (
            lambda path: torch.save(STATE, path, _use_new_zipfile_serialization=False),
            "is not a readable checkpoint: it is no archive",
        ),
        (lambda path: torch.save({"x": Evil()}, path), "is not a readable checkpoint: "),
        (
            lambda path: zipfile.ZipFile(path, "w").writestr("readme", "hello"),
            "is not a readable checkpoint",
        ),
    ],
    ids=["missing", "folder", "fifo", "empty", "short", "text", "legacy", "code", "zip"],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path, monkeypatch, make, message):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "last.pt")
    with pytest.raises(DataError, match=rf"last\.pt {message}") as caught:
        load_checkpoint(tmp_path / "last.pt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_the_checkpoint_before_is_kept(path, tmp_path):
    previous = tmp_path / "previous.pt"
    write_checkpoint(path, pack_checkpoint({"epoch": 4}), previous=previous)
    assert load_checkpoint(path) == {"epoch": 4}
    assert load_checkpoint(previous)["epoch"] == 3
    path.write_bytes(flipped(path.read_bytes(), 100))
    assert load_checkpoint(previous)["epoch"] == 3


@pytest.mark.parametrize("damage", ["flip", "shorter", "longer"])
def test_what_does_not_read_back_does_not_take_the_old_one_s_place(path, monkeypatch, damage):
    """The disk returns something else than was written."""
    content, fsync = path.read_bytes(), os.fsync

    def sync(descriptor):
        fsync(descriptor)
        written = path.with_name(".last.pt.tmp")
        if written.exists():
            new = written.read_bytes()
            damaged = {"flip": flipped(new, 500), "shorter": new[:-1], "longer": new + b"\0"}
            written.write_bytes(damaged[damage])

    monkeypatch.setattr("os.fsync", sync)
    with pytest.raises(StorageError, match=r"last\.pt: what was written does not read back the sa"):
        write_checkpoint(path, pack_checkpoint({"epoch": 4}), previous=path.with_name("previous"))
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


# Atomic files


def test_a_failed_write_leaves_the_old_file_and_names_it(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"new")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StorageError, match=r"cannot write .*file: No space left on device"):
        write_atomic(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_another_kind_passes_and_leaves_the_old_file_too(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, lambda file: file.write(b"old"))
    with pytest.raises(ZeroDivisionError):
        write_atomic(path, lambda file: 1 / 0)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("links", [True, False])
def test_a_linked_file_does_not_follow_later_writes(tmp_path, monkeypatch, links):
    if not links:

        def refuse(*paths):
            raise OSError("no links here")

        monkeypatch.setattr("os.link", refuse)
    last, best = tmp_path / "last", tmp_path / "best"
    write_atomic(last, lambda file: file.write(b"1"))
    link_atomic(last, best)
    write_atomic(last, lambda file: file.write(b"2"))
    assert (last.read_bytes(), best.read_bytes()) == (b"2", b"1")
