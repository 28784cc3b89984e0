"""Scalars for TensorBoard: one value for each epoch, whatever happened to the run."""

import sys

import pytest

from wus_ext.cli import main
from wus_ext.training import ConfigError, MissingExtra, Trainer

from . import tiny
from .tiny import trainer


def test_without_tensorboard_one_line_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtra, match=r"--tensorboard needs .*'wus_ext\[tensorboard\]'"):
        trainer(out=tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def shown():
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def show(folder):
        events = reader.EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        return {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
        }

    return show


def test_every_epoch_has_one_value(tmp_path, shown):
    run = trainer(out=tmp_path, tensorboard=True, method="wus")
    run.run()
    values = shown(tmp_path)
    assert {"loss/train", "loss/test", "accuracy/test", "run/lr", "run/skipped"} <= values.keys()
    expected = [(r["epoch"], pytest.approx(r["test_loss"])) for r in run.history]
    assert values["loss/test"] == expected
    assert [value for _, value in values["run/skipped"]] == [r["skipped"] for r in run.history]
    assert "loss/validation" not in values


def test_a_resumed_run_has_no_epoch_twice_and_none_too_few(tmp_path, shown):
    first = trainer(out=tmp_path)
    first.run_epoch()  # without scalars
    second = trainer(out=tmp_path, resume=True, tensorboard=True)
    second.run_epoch()
    del second
    trainer(out=tmp_path, resume=True, tensorboard=True).run()
    assert [epoch for epoch, _ in shown(tmp_path)["loss/train"]] == [1, 2, 3, 4]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_a_run_that_fails_at_once_leaves_no_folder(tmp_path, monkeypatch, shown):
    original = Trainer.__init__

    def init(self, config, **options):
        original(self, config, data=tiny.data(), build=tiny.build, **options)

    monkeypatch.setattr(Trainer, "__init__", init)
    out = tmp_path / "run"
    assert (
        main(["train", "--lr", "1e30", "--batch-size", "8", "--tensorboard", "--out", str(out)])
        == 1
    )
    assert not out.exists()


def test_scalars_need_no_folder_to_write_to():
    pytest.importorskip("tensorboard")
    assert len(trainer(tensorboard=True).run()) == 4
    with pytest.raises(ConfigError, match="tensorboard must be true or false"):
        trainer(tensorboard="yes")
