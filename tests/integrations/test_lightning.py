"""The Lightning callback, in Lightning's own Trainer."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch import nn

import wus_ext

pl = pytest.importorskip("lightning.pytorch")
from wus_ext.integrations import _decisions  # noqa: E402
from wus_ext.integrations.lightning import WeightUpdateSkipping  # noqa: E402

FLAT = [0.1, 0.5, 0.502, 0.504, 0.503, 0.505, 0.6, 0.601]
SETTINGS = {"threshold": 1.0, "patience": 1, "max_window": 2, "warmup": 1}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 2)
        )

    def forward(self, x):
        return self.layers(x)


class Classifier(pl.LightningModule):
    """Logs the accuracies of a table, and notes what trained in each epoch."""

    def __init__(self, accuracies=FLAT, where="validation", schedule=None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = Network()
        self.accuracies, self.where, self.schedule = accuracies, where, schedule
        self.trained: list[set[str]] = []
        self.rates: list[float] = []

    def accuracy(self) -> float:
        return self.accuracies[self.current_epoch]

    def training_step(self, batch, index):
        if self.where == "training":
            self.log("acc", self.accuracy(), on_step=False, on_epoch=True)
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def validation_step(self, batch, index):
        if self.where == "validation":
            self.log("acc", self.accuracy())

    def on_train_epoch_start(self):
        self.before = {name: p.detach().clone() for name, p in self.named_parameters()}
        self.rates.append(self.optimizers().param_groups[0]["lr"])

    def on_train_epoch_end(self):
        if self.where == "epoch_end":
            self.log("acc", self.accuracy())
        self.trained.append(
            {
                name.removeprefix("network.layers.")
                for name, p in self.named_parameters()
                if not torch.equal(p, self.before[name])
            }
        )

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer)}

    def skipped(self) -> list[bool]:
        biases = {"0.bias", "3.bias"}
        assert all(names in (biases, biases | {"0.weight", "3.weight"}) for names in self.trained)
        return [names == biases for names in self.trained]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def batches():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 1, 4, 4, generator=generator)
    labels = torch.randint(0, 2, (8,), generator=generator)
    data = torch.utils.data.TensorDataset(images, labels)
    return torch.utils.data.DataLoader(data, batch_size=4)


def fit(model, callback, *, epochs=8, checkpoint=None, more=(), validate=True, **options):
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback, *more],
        enable_checkpointing=bool(more),
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        **options,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer.fit(model, batches(), batches() if validate else None, ckpt_path=checkpoint)
    return trainer


def decisions(accuracies, policy) -> list[bool]:
    """What the policy says for each epoch, the first one included."""
    return [False, *(policy.step(100 * accuracy) for accuracy in accuracies[:-1])]


def plain_policy(**settings):
    return wus_ext.WUS(wus_ext.convert(nn.Linear(2, 2)), **(SETTINGS | settings))


EXPECTED = [False, False, False, True, True, False, True, False]


@pytest.mark.parametrize("where", ["validation", "training", "epoch_end"])
def test_epochs_after_a_flat_accuracy_skip(where):
    model, callback = Classifier(where=where), WeightUpdateSkipping("acc", **SETTINGS)
    trainer = fit(model, callback)
    assert decisions(FLAT, plain_policy()) == EXPECTED
    assert model.skipped() == EXPECTED
    assert trainer.callback_metrics["skipping_weight_updates"] == float(EXPECTED[-1])
    assert isinstance(model, Classifier)
    assert isinstance(model.network.layers[0], wus_ext.nn.Conv2d)


def test_the_network_runs_fused(caplog):
    model = Classifier()
    with caplog.at_level(logging.INFO, "wus_ext"):
        fit(model, WeightUpdateSkipping("acc", **SETTINGS))
    assert "Network: fused 2 chains" in caplog.text


def test_afterwards_everything_trains_again():
    accuracies = [0.5] * 3
    model = Classifier(accuracies)
    callback = WeightUpdateSkipping("acc", **(SETTINGS | {"max_window": 9}))
    fit(model, callback, epochs=3)
    assert model.skipped() == [False, False, True]
    assert not wus_ext.is_skipping(model)


def test_epochs_without_a_new_value_do_not_count():
    accuracies = [0.0, 0.5, 0.0, 0.502, 0.0, 0.504, 0.0, 0.505]
    model = Classifier(accuracies)
    fit(model, WeightUpdateSkipping("acc", **SETTINGS), check_val_every_n_epoch=2)
    # heard after the second, fourth, sixth epoch; flat from the fourth on
    assert model.skipped() == [False] * 4 + [True] * 4


def test_percent():
    model = Classifier([100 * accuracy for accuracy in FLAT])
    fit(model, WeightUpdateSkipping("acc", percent=True, **SETTINGS))
    assert model.skipped() == EXPECTED


@pytest.mark.parametrize("lr_drop", [0.5, None])
def test_schedulers_step_once_and_a_drop_reopens(lr_drop):
    accuracies = [0.5] * 6
    model = Classifier(
        accuracies, schedule=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.1)
    )
    settings = SETTINGS | {"max_window": 9}
    fit(model, WeightUpdateSkipping("acc", lr_drop=lr_drop, **settings), epochs=6)
    assert model.rates == pytest.approx([0.1] * 3 + [0.01] * 3)
    assert model.skipped() == [False, False, True, lr_drop is None, True, True]


def test_a_plateau_scheduler_reopens_as_well():
    def schedule(optimizer):
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", 0.1, patience=1)
        return {"scheduler": plateau, "monitor": "acc"}

    model = Classifier([0.5] * 5, schedule=schedule)
    fit(model, WeightUpdateSkipping("acc", **(SETTINGS | {"max_window": 9})), epochs=5)
    assert model.rates == pytest.approx([0.1] * 3 + [0.01] * 2)
    assert model.skipped() == [False, False, True, False, True]


@pytest.mark.parametrize("stop", [2, 3, 4, 5])
def test_resumed_training_decides_alike(stop, tmp_path):
    saver = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    schedule = lambda made: torch.optim.lr_scheduler.MultiStepLR(made, [2, 6])  # noqa: E731
    whole = Classifier(schedule=schedule)
    fit(whole, WeightUpdateSkipping("acc", **SETTINGS), more=[saver])
    path = tmp_path / f"epoch={stop}.ckpt"
    rest = Classifier(schedule=schedule)
    callback = WeightUpdateSkipping("acc", **SETTINGS)
    fit(rest, callback, checkpoint=str(path))
    assert rest.skipped() == whole.skipped()[stop + 1 :]
    for name, parameter in whole.named_parameters():
        assert torch.equal(rest.get_parameter(name), parameter), name


def test_a_model_that_the_user_converted_is_left_as_it_is():
    model = Classifier()
    wus_ext.convert(model.network, fuse=False)
    kinds = [type(module) for module in model.modules()]
    fit(model, WeightUpdateSkipping("acc", **SETTINGS))
    assert [type(module) for module in model.modules()] == kinds
    assert model.skipped() == EXPECTED


def test_a_model_made_in_configure_model():
    class Late(Classifier):
        def __init__(self):
            super().__init__()
            del self.network

        def configure_model(self):
            if not hasattr(self, "network"):
                self.network = Network()

    model = Late()
    fit(model, WeightUpdateSkipping("acc", **SETTINGS))
    assert model.skipped() == EXPECTED


def test_errors():
    with pytest.raises(ValueError, match="patience must be at least 1"):
        WeightUpdateSkipping("acc", patience=0)
    with pytest.raises(ValueError, match="lr_drop must be between 0 and 1"):
        WeightUpdateSkipping("acc", lr_drop=2.0)
    for validate in (True, False):
        with pytest.raises(ValueError, match="no metric 'accuracy' was logged; there are"):
            fit(Classifier(), WeightUpdateSkipping("accuracy"), validate=validate)
    with pytest.raises(ValueError, match=r"acc: got 50, expected an accuracy, a fraction, 0 to 1"):
        fit(Classifier([50.0]), WeightUpdateSkipping("acc"), epochs=1)
    with pytest.raises(ValueError, match="expected an accuracy, in percent"):
        fit(Classifier([-3.0]), WeightUpdateSkipping("acc", percent=True), epochs=1)


@pytest.fixture
def converted(monkeypatch):
    """What the callback converts, and with which settings."""
    given = []
    original = _decisions.convert

    def convert(module, **settings):
        given.append((type(module).__name__, settings))
        return original(module, **settings)

    monkeypatch.setattr(_decisions, "convert", convert)
    return given


def test_settings_of_convert_and_the_layers_that_skip(converted):
    settings = {"full": "fused", "norm": "frozen", "algo": "f2"}
    model = Classifier([0.5] * 3)
    callback = WeightUpdateSkipping("acc", layers="network.layers.3", **settings, **SETTINGS)
    fit(model, callback, epochs=3)
    assert converted == [("Network", settings), ("Classifier", settings)]
    assert [sorted(names) for names in model.trained][2] == ["0.bias", "0.weight", "3.bias"]


def test_a_setting_that_is_given_converts_anew(converted):
    model = Classifier()
    wus_ext.convert(model.network, fuse=False)
    fit(model, WeightUpdateSkipping("acc", **SETTINGS))
    assert converted == []
    model.trained.clear()
    fit(model, WeightUpdateSkipping("acc", full="fused", **SETTINGS))
    assert [settings for _, settings in converted] == [{"full": "fused"}] * 2
    assert model.skipped() == EXPECTED


def test_wrong_settings_of_convert_are_refused_at_once():
    with pytest.raises(ValueError, match="full: 'fast' is not one of stock, fused"):
        WeightUpdateSkipping("acc", full="fast")
