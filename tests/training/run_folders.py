"""What tests of run folders share."""

import contextlib
import errno
import os
import resource

import pytest

from wus_ext.training import (
    DataError,
    load_checkpoint,
)
from wus_ext.training.checkpoint import pack_checkpoint

from .tiny import trainer

METHODS = ["baseline", "fused", "wus", "wus+lr"]
LAST = "last.pt"


def snapshot(folder):
    """Every file of the run, to the byte."""
    return {
        path.name: path.read_bytes() if path.is_file() else None
        for path in folder.iterdir()
        if path.name != ".lock"
    }


@contextlib.contextmanager
def unchanged(folder):
    before = snapshot(folder)
    yield
    assert snapshot(folder) == before


def refuses(folder, message, error=DataError, **settings):
    """Resuming fails with one line and changes nothing."""
    with unchanged(folder), pytest.raises(error, match=message) as caught:
        trainer(out=folder, resume=True, **settings)
    assert "\n" not in str(caught.value)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def change(folder, **values):
    """As if the run had stored other values: whole, with the right checksum."""
    state = load_checkpoint(folder / LAST)
    for name, value in values.items():
        if value is None:
            del state[name]
        else:
            state[name] = value
    (folder / LAST).write_bytes(pack_checkpoint(state))


def worse(history):
    """So that the next epoch is the best."""
    return [{**record, "test_accuracy": 0.0} for record in history]


def torn(text):
    return text[: len(text) - 40]


@contextlib.contextmanager
def largest_file(size):
    """The system refuses to write more, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fails_for(name, monkeypatch, reason=errno.ENOSPC):
    """The file of this name cannot be replaced."""
    replace = os.replace

    def full(source, target):
        if os.path.basename(target) == name:
            raise OSError(reason, os.strerror(reason))
        replace(source, target)

    monkeypatch.setattr("os.replace", full)
