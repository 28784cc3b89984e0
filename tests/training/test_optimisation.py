"""How parameters move: optimizers, warm-up, label smoothing, clipped gradients."""

import pytest
import torch

from wus_ext.training import ConfigError, TrainConfig
from wus_ext.training.loop import train_epoch
from wus_ext.training.runfolder import RunFolder

from . import tiny
from .test_options import at_a_window, moved, values
from .tiny import trainer, weights

CPU = torch.device("cpu")
ADAMW = {"optimizer": "adamw", "lr": 0.01}


def without_dropout(classes):
    model = tiny.build(classes)
    model[3].p = 0.0
    return model


def by_hand(run, steps, **options):
    """Stock training of the same network on the same batches."""
    model = without_dropout(2)
    model.load_state_dict({name: v.clone() for name, v in run.model.state_dict().items()})
    optimizer = options.pop("optimizer")(model.parameters())
    clip = options.pop("clip", None)
    for images, labels in list(run.data.training_batches(8, 0, 1, CPU))[:steps]:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels, **options)
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        (ADAMW, {"optimizer": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=5e-4)}),
        ({"label_smoothing": 0.3}, {"label_smoothing": 0.3}),
        ({"clip_grad_norm": 0.05}, {"clip": 0.05}),
    ],
    ids=["adamw", "label smoothing", "clipped"],
)
@pytest.mark.parametrize("method", ["baseline", "wus"])
def test_steps_are_those_of_a_loop_by_hand(settings, options, method):
    run = trainer(method=method, build=without_dropout, **settings)
    options.setdefault(
        "optimizer", lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=5e-4)
    )
    expected = by_hand(run, 4, **options)
    plain = trainer(method=method, build=without_dropout)
    run.run_epoch(), plain.run_epoch()
    torch.testing.assert_close(weights(run), expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(weights(plain), expected, rtol=1e-4, atol=1e-6)


def test_evaluation_knows_nothing_of_label_smoothing():
    run = trainer(label_smoothing=0.9)
    run.run_epoch()
    images, labels = run.data.normalize(run.data.test.images), run.data.test.labels
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(run.model.eval()(images), labels)
    assert run.history[-1]["test_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_clipping_comes_after_the_scaler_has_been_undone():
    model = tiny.build(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    batch = next(tiny.data().training_batches(8, 0, 1, CPU))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    train_epoch(model, [batch], optimizer, device=CPU, scaler=scaler, clip_grad_norm=1e-3)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (after - before).norm().item() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_each_optimizer_has_its_rate(optimizer):
    rate = {"sgd": 0.01, "adamw": 0.001}[optimizer]
    assert TrainConfig(optimizer=optimizer).rate() == rate
    run = trainer(optimizer=optimizer, lr=None, schedule="constant")
    assert run.optimizer.param_groups[0]["lr"] == rate


def test_weights_stand_still_in_windows_of_adamw_as_well():
    run = at_a_window(**ADAMW)
    assert moved(run) == {"0.bias", "1.bias", "5.bias"}
    assert moved(run) == set(values(run))


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_adamw_resumes_bit_for_bit(tmp_path, stop):
    settings = {"method": "wus", "lr_warmup": 1, "clip_grad_norm": 0.5, **ADAMW}
    whole, first = trainer(**settings), trainer(out=tmp_path, **settings)
    whole.run()
    for _ in range(stop):
        first.run_epoch()
    second = trainer(out=tmp_path, resume=True, **settings)
    second.run()
    assert torch.equal(weights(second), weights(whole))
    assert RunFolder(tmp_path).read_config().optimizer == "adamw"


def test_momentum_of_adamw_can_be_reset():
    run = at_a_window(window_momentum="reset", max_window=1, **ADAMW)
    run.run_epoch()
    state = run.optimizer.state
    assert not state[run.model[0].weight]["exp_avg"].any()
    assert state[run.model[0].bias]["exp_avg"].any()
    assert state[run.model[0].weight]["exp_avg_sq"].any()


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("cosine", [1 / 3, 2 / 3, 1.0, 0.8535534, 0.5, 0.1464466]),
        ("step", [1 / 3, 2 / 3, 1, 0.1, 0.01, 0.01]),
    ],
)
def test_the_rate_rises_evenly_before_the_schedule(schedule, rates):
    run = trainer(
        method="baseline", schedule=schedule, lr_warmup=2, epochs=6, milestones=(0.5, 0.7)
    )
    assert [r["lr"] for r in run.run()] == pytest.approx([0.05 * rate for rate in rates])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "lion"}, "optimizer must be one of sgd, adamw, got 'lion'"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm must be positive, got 0.0"),
        ({"lr_warmup": -1}, "lr_warmup must be at least 0, got -1"),
        ({"lr_warmup": 4, "epochs": 4}, "lr_warmup must be less than the 4 epochs, got 4"),
    ],
)
def test_a_bad_setting_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings).validate()
