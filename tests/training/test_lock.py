"""One run at a time in a folder, whatever happens to its process."""

import contextlib
import errno
import fcntl
import gc
import os
import signal
import subprocess
import sys
import threading

import pytest

from wus_ext.training import ConfigError, RunWarning, StorageError
from wus_ext.training.lock import FolderLock

from .rights import without_override

#: Holds the lock as any program may, until it is killed or told to end.
HOLDER = """
import fcntl, os, sys
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
file.write("process 123 on elsewhere\\n")
file.flush()
print("locked", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def held_by_another(folder):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", HOLDER, str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        yield process
        process.stdin.close()


def free(folder):
    """Whether another process could lock ``folder``."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def test_a_folder_in_use_is_refused_by_name_and_holder(tmp_path):
    with held_by_another(tmp_path):
        with pytest.raises(
            ConfigError, match=r"is in use by another run \(process 123 on elsewhere\): wait for"
        ) as caught:
            FolderLock(tmp_path).acquire()
        assert str(tmp_path) in str(caught.value)
    FolderLock(tmp_path).acquire()


def test_a_killed_process_leaves_no_lock(tmp_path):
    with held_by_another(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / ".lock").exists()
        with FolderLock(tmp_path):
            assert not free(tmp_path)


def test_the_lock_is_held_until_it_is_released_and_leaves_nothing(tmp_path):
    lock = FolderLock(tmp_path / "a" / "run")
    lock.acquire()
    lock.acquire()
    assert not free(lock.path)
    assert f"process {os.getpid()} on " in (lock.path / ".lock").read_text()
    lock.release()
    assert not (tmp_path / "a").exists()
    lock.release()


def test_a_folder_that_was_there_or_is_filled_stays(tmp_path):
    with FolderLock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
    with FolderLock(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]


def test_a_lock_that_nobody_refers_to_is_released(tmp_path):
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert not free(tmp_path)
    del lock
    gc.collect()
    assert not (tmp_path / ".lock").exists()


def test_a_worker_that_outlives_the_process_does_not_keep_the_lock(tmp_path):
    lock = FolderLock(tmp_path)
    lock.acquire()
    ready, done = os.pipe(), os.pipe()
    worker = os.fork()
    if worker == 0:  # as the workers of a DataLoader
        os.write(ready[1], b".")
        os.read(done[0], 1)
        os._exit(0)
    try:
        os.read(ready[0], 1)
        os.close(lock._held.descriptor)  # what the system does when it kills a process
        assert free(tmp_path)
    finally:
        os.write(done[1], b".")
        os.waitpid(worker, 0)
        lock._held.close.detach()
        lock._held = None


def test_a_later_lock_of_the_process_takes_over(tmp_path):
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.acquire()
    second.acquire()
    with second.writing():
        pass
    with pytest.raises(StorageError, match="belongs to a later run"), first.writing():
        pytest.fail("two at a time")
    first.release()
    assert not free(tmp_path)
    second.release()
    with first.writing():
        assert not free(tmp_path)


def test_nobody_takes_over_while_a_file_is_written(tmp_path):
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    with first.writing():
        thread = threading.Thread(target=second.acquire)
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
    thread.join()
    with second.writing():
        pass


def test_the_lock_of_a_folder_is_the_same_by_another_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    first, second = FolderLock(tmp_path / "link"), FolderLock(tmp_path / "run")
    first.acquire()
    second.acquire()
    with pytest.raises(StorageError), first.writing():
        pass
    monkeypatch.chdir("/")
    second.release()
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_file_that_its_holder_removed_in_between_is_not_mistaken_for_the_lock(
    tmp_path, monkeypatch
):
    """Opened before the holder removes it, locked after."""
    flock, path = fcntl.flock, tmp_path / ".lock"

    def late(descriptor, operation):
        monkeypatch.setattr("fcntl.flock", flock)
        path.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr("fcntl.flock", late)
    with FolderLock(tmp_path):
        assert path.exists()
        assert not free(tmp_path)


def test_where_the_file_system_has_no_locks_the_run_says_so_and_goes_on(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(RunWarning, match=r"cannot be locked \(No locks available\)"):
        FolderLock(tmp_path).acquire()


def test_a_lock_is_no_way_to_overwrite_a_file_elsewhere(tmp_path):
    (tmp_path / "thesis").write_text("text")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "thesis")
    with pytest.raises(ConfigError, match="cannot write to"):
        FolderLock(tmp_path / "run").acquire()
    assert (tmp_path / "thesis").read_text() == "text"


def make_read_only(path):
    path.mkdir()
    path.chmod(0o555)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (make_read_only, "Permission denied"),
        (lambda path: make_read_only(path.parent), "Permission denied"),
        (lambda path: path.parent.write_text("a file"), "Not a directory"),
        (lambda path: [path.parent.mkdir(), path.symlink_to("nothing")], "File exists"),
    ],
    ids=["folder", "parent", "file", "dangling"],
)
def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, make, reason):
    path = tmp_path / "parent" / "run" if make is not make_read_only else tmp_path / "run"
    make(path)
    with without_override(), pytest.raises(ConfigError, match=rf"cannot write to .*\({reason}\)"):
        FolderLock(path).acquire()
