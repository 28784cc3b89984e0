"""How skipped epochs run: the trainer's options beyond the paper, each off by default."""

import pytest
import torch
from torch import nn

import wus_ext
from wus_ext.profiling.saved import saving
from wus_ext.training import ConfigError, Trainer
from wus_ext.training.compare import CompareConfig, compare
from wus_ext.training.runfolder import RunFolder

from . import tiny

#: Windows of one epoch, with steps of 4: epochs 3 and 5 skip.
WINDOWS = tiny.CONFIG.replace(method="wus", epochs=5, max_window=1, schedule="constant")
OPTIONS = {
    "layers": {"skip_layers": ("0",)},
    "full steps": {"full_every": 3},
    "gamma": {"train_gamma": True},
    "bias rate": {"bias_lr": 2.0},
    "momentum": {"window_momentum": "reset"},
    "all, with a schedule": {
        "method": "wus+lr", "schedule": "cosine", "skip_layers": ("0", "5"), "full_every": 2,
        "train_gamma": True, "bias_lr": 0.5, "window_momentum": "reset",
    },
}  # fmt: skip


def build(classes):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(4 * 8 * 8, classes),
    )


def trainer(out=None, resume=False, build=build, **settings):
    config = WINDOWS.replace(**settings)
    return Trainer(config, out=out, resume=resume, data=tiny.data(), build=build)


def at_a_window(**settings):
    run = trainer(**settings)
    while not run.policy.skipping:
        run.run_epoch()
    return run


def values(run):
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def moved(run):
    """The names of the parameters that the next epoch changes."""
    before = values(run)
    run.run_epoch()
    return {name for name, value in values(run).items() if not torch.equal(value, before[name])}


def same(run, other):
    pairs = zip(values(run).values(), values(other).values(), strict=True)
    return all(torch.equal(mine, its) for mine, its in pairs)


BIASES = {"0.bias", "1.bias", "5.bias"}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_option_shows_from_the_first_window_on(options):
    method = {name: options[name] for name in ("method", "schedule") if name in options}
    plain, run = trainer(**method), trainer(**options)
    for _ in range(2):
        plain.run_epoch(), run.run_epoch()
    assert plain.policy.skipping
    assert run.policy.skipping
    assert same(plain, run)
    plain.run(), run.run()
    assert not same(plain, run)


@pytest.mark.parametrize("stop", [2, 3])
@pytest.mark.parametrize("options", [*OPTIONS.values(), {"full": "fused"}], ids=[*OPTIONS, "full"])
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(tmp_path, options, stop):
    whole, first = trainer(**options), trainer(out=tmp_path, **options)
    whole.run()
    for _ in range(stop):
        first.run_epoch()
    second = trainer(out=tmp_path, resume=True, **options)
    second.run()
    assert same(second, whole)
    assert [r["skipped"] for r in second.history[:4]] == [False, False, True, False]
    for name in ("lr", "skipped", "skipped_steps", "train_loss", "peak_bytes", "packed_bytes"):
        assert [r[name] for r in second.history] == [r[name] for r in whole.history], name


def test_options_survive_the_folder_and_contradictions_are_refused(tmp_path):
    settings = OPTIONS["all, with a schedule"]
    run = trainer(out=tmp_path, **settings)
    assert RunFolder(tmp_path).read_config() == run.config
    with pytest.raises(ConfigError, match=r"skip_layers is \['0', '5'\] there, \['0'\] here"):
        trainer(out=tmp_path, resume=True, **{**settings, "skip_layers": ("0",)})


# Layers


def test_layers_that_do_not_skip_train_in_a_window():
    run = at_a_window(skip_layers=("0", "1"))
    assert moved(run) == {"0.bias", "1.bias", "5.weight", "5.bias"}
    assert run.history[-1]["skipped"]
    assert moved(run) == set(values(run))


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("0", "conv*"), "skip_layers: no module's name matches 'conv[*]'; there are 0, "),
        (("2",), r"skip_layers: what was chosen \(ReLU\) has nothing that can skip"),
    ],
)
def test_a_pattern_that_means_nothing_is_refused_before_any_work(tmp_path, patterns, message):
    with pytest.raises(ConfigError, match=message):
        trainer(out=tmp_path / "run", skip_layers=patterns)
    assert not (tmp_path / "run").exists()
    trainer(method="baseline", skip_layers=patterns)


def test_a_comparison_checks_patterns_against_every_network_first(tmp_path):
    base = WINDOWS.replace(skip_layers=("layer1",))
    with pytest.raises(ConfigError, match="no module's name matches 'layer1'"):
        compare(CompareConfig(base, ("resnet18", "alexnet"), ("wus",)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Full steps within a window


def test_every_nth_step_of_a_window_is_full_and_only_others_take_the_bias_rate():
    run = at_a_window(
        method="wus+lr", schedule="cosine", skip_layers=("0",), full_every=3, bias_lr=4.0
    )
    steps = []

    def note(model, inputs):
        if model.training:
            assert not model[-1].skip_wgrad
            steps.append((model[0].skip_wgrad, run.optimizer.param_groups[0]["lr"]))

    run.model.register_forward_pre_hook(note)
    run.run_epoch()
    record = run.history[-1]
    rate = record["lr"]
    skip = (True, 4 * rate)
    assert steps == [skip, skip, (False, rate), skip]
    assert (record["skipped"], record["skipped_steps"]) == (True, 0.75)
    steps.clear()
    run.run_epoch()
    assert steps == [(False, run.history[-1]["lr"])] * 4
    assert run.history[-1]["skipped_steps"] == 0.0


def packed(classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 8 * 8, classes),
    )


@pytest.mark.parametrize("full_every", [None, 3, 4])
def test_a_window_stays_open_between_its_epochs(full_every):
    run = at_a_window(full_every=full_every, max_window=3, build=packed, algo="f4")
    for _ in range(2):
        record = run.run_epoch()
        assert record["skipped"]
        assert run.policy.skipping
        assert wus_ext.is_skipping(run.model)
        assert record["packed_bytes"] > 0
    assert run.history[0]["packed_bytes"] == 0


# Learning rate and momentum


def test_the_bias_rate_is_the_learning_rate_of_a_skipped_epoch():
    scaled, by_hand = at_a_window(bias_lr=3.0), at_a_window()
    by_hand.optimizer.param_groups[0]["lr"] *= 3.0
    assert moved(scaled) == moved(by_hand) == BIASES
    assert same(scaled, by_hand)
    assert scaled.optimizer.param_groups[0]["lr"] == tiny.CONFIG.rate() == scaled.history[-1]["lr"]


def test_scheduler_and_policy_see_the_schedule_not_the_bias_rate():
    settings = {"method": "wus+lr", "schedule": "cosine", "max_window": 3, "epochs": 6}
    plain, scaled = trainer(**settings), trainer(bias_lr=0.01, **settings)
    plain.run(), scaled.run()
    for name in ("lr", "skipped"):
        assert [r[name] for r in scaled.history] == [r[name] for r in plain.history]


@pytest.mark.parametrize("full_every", [None, 4], ids=["skips", "full step last"])
@pytest.mark.parametrize("window_momentum", ["keep", "reset"])
def test_momentum_of_what_skipped_is_kept_or_dropped_when_the_window_ends(
    window_momentum, full_every
):
    run = at_a_window(
        window_momentum=window_momentum,
        full_every=full_every,
        max_window=2,
        final_window=0,
        skip_layers=("0",),
    )

    def moving():
        state = run.optimizer.state
        return {n for n, p in run.model.named_parameters() if state[p]["momentum_buffer"].any()}

    assert moving() == set(values(run))
    run.run_epoch()
    assert moving() == set(values(run))
    run.run_epoch()
    assert not run.policy.skipping
    dropped = {"0.weight"} if window_momentum == "reset" else set()
    assert moving() == set(values(run)) - dropped


def test_gamma_trains_in_a_window_if_told_to():
    assert moved(at_a_window()) == BIASES
    assert moved(at_a_window(train_gamma=True)) == BIASES | {"1.weight"}


# Memory


def test_records_tell_what_steps_of_each_kind_save():
    baseline, run = trainer(method="baseline"), trainer(full_every=4)
    baseline.run(), run.run()
    assert len({record["peak_bytes"] for record in baseline.history}) == 1
    full = baseline.history[0]["peak_bytes"]
    # Batches of 8: conv output, batch norm output, mask or output of ReLU and dropout, ... at
    # least the inputs of batch norm and of the linear layer.
    assert full >= 2 * 8 * 4 * 8 * 8 * 4
    assert [record["peak_bytes"] for record in run.history[:2]] == [full, full]
    only_skips = trainer()
    only_skips.run()
    assert 0 < only_skips.history[2]["peak_bytes"] - only_skips.history[2]["packed_bytes"] < full
    assert run.history[2]["peak_bytes"] >= full  # its last step is a full one


def test_saving_counts_each_storage_once_and_what_is_kept_not_at_all():
    x, weight = torch.ones(5, requires_grad=True), torch.ones(5, requires_grad=True)
    with saving([x, weight]) as saved:
        y = x * weight
        assert saved() == 0
        z = y.exp()
        (z * z[:2].sum()).sum()
    assert saved() == 20 + 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"full_every": 1}, "full_every must be at least 2, got 1"),
        ({"full_every": 2.5}, "full_every must be an integer"),
        ({"bias_lr": 0.0}, "bias_lr must be positive, got 0.0"),
        ({"window_momentum": "halve"}, "window_momentum must be one of keep, reset, got 'halve'"),
        ({"skip_layers": "0"}, "skip_layers must be a tuple of patterns, got '0'"),
        ({"skip_layers": (0,)}, r"skip_layers must be a tuple of patterns, got \(0,\)"),
        ({"train_gamma": True, "norm": "frozen"}, "train_gamma needs norm 'batch'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_option_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        WINDOWS.replace(**settings).validate()


# The end of a run


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant"}, [False] * 5 + [True]),
        ({"schedule": "constant", "final_window": 0}, [False] * 6),
        ({"schedule": "constant", "final_window": 2}, [False] * 4 + [True] * 2),
        ({"schedule": "cosine"}, [False] * 6),
        ({"schedule": "cosine", "final_window": 1}, [False] * 5 + [True]),
        ({"schedule": "cosine", "final_window": 1, "method": "wus+lr"}, [False] * 5 + [True]),
        ({"schedule": "constant", "method": "fused"}, [False] * 6),
    ],
)
def test_a_run_at_a_constant_rate_ends_in_a_window(settings, expected):
    run = trainer(**({"threshold": 0.0, "epochs": 6} | settings))
    assert [record["skipped"] for record in run.run()] == expected
