"""Packed weights: how long they live, when they are made anew, how much memory they take."""

from __future__ import annotations

import copy

import pytest
import torch

import wus_ext
from wus_ext.engine.conv.copies import Form, packed_nbytes
from wus_ext.engine.conv.geometry import Scheme
from wus_ext.engine.engine import Engine

from .chains import CHAINS, CHANNELS, build, check, images, relative_error, run, stock_chain


def test_packed_weights_live_as_long_as_their_window():
    _, skip = build("conv_relu", algo="f4")
    assert wus_ext.packed_bytes(skip) == 0
    run(skip, images())
    packed = wus_ext.packed_bytes(skip)
    assert packed > 0
    run(skip, images())
    assert wus_ext.packed_bytes(skip) == packed
    wus_ext.set_skip(skip, False)
    assert wus_ext.packed_bytes(skip) == 0


def test_a_full_step_drops_the_packed_weights_of_single_skip_steps():
    _, skip = build("conv_relu", algo="f4")
    wus_ext.set_skip(skip, False)
    with wus_ext.skip_weight_updates(skip):
        run(skip, images())
    assert wus_ext.packed_bytes(skip) > 0
    run(skip, images())
    assert wus_ext.packed_bytes(skip) == 0


@pytest.mark.parametrize("algo", ["f2", "f4"])
@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_a_changed_weight_is_packed_again(algo, norm):
    stock, skip = build("conv_norm_relu", algo=algo, norm=norm)
    if norm == "frozen":
        stock.eval()
    run(skip, images())
    with torch.no_grad():
        for model in (stock, skip):
            model[3].weight.mul_(0.5)
            model[4].weight.add_(0.25)
            model[4].running_var.copy_(torch.full((CHANNELS,), 2.0))
            model[4].running_mean.zero_()
    skip.load_state_dict(stock.state_dict())
    check(stock, skip, images(), tolerance=2e-5)


@pytest.mark.parametrize("batches", [(2, 5, 3)])
def test_batch_sizes_share_packed_weights(batches):
    stock, skip = build("linear")
    packed = set()
    for batch in batches:
        check(stock, skip, images((batch, 3, 12, 10)), tolerance=2e-5)
        packed.add(wus_ext.packed_bytes(skip))
    assert len(packed) == 1


@pytest.mark.parametrize("algo", ["direct", "f4"])
def test_evaluation_between_skip_steps_takes_the_newest_statistics(algo):
    stock, skip = build("conv_norm_relu", algo=algo)
    for factor in (1, 3):
        x = factor * images()
        for model in (stock, skip):
            run(model.train(), x)
        torch.testing.assert_close(skip.eval()(x), stock.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.fixture
def all_fused(monkeypatch):
    """Without gradients, too, chains run however few their values are."""
    monkeypatch.setattr(Engine, "FEW_VALUES", 0)


@pytest.mark.usefixtures("all_fused")
def test_evaluation_packs_for_the_forward_pass_only():
    _, skip = build("conv_relu", algo="f4")
    with torch.no_grad():
        skip(images())
    forward_only = wus_ext.packed_bytes(skip)
    run(skip, images())
    assert 0 < forward_only < wus_ext.packed_bytes(skip)


@pytest.mark.usefixtures("all_fused")
def test_evaluations_in_one_window_see_the_scale_that_trains():
    """Here torch's fused SGD changes it, which raises no version counter."""
    stock = stock_chain("conv_norm_relu").eval()
    skip = wus_ext.convert(copy.deepcopy(stock), skip_gamma=False)
    wus_ext.set_skip(skip, True)
    x = images()
    for _ in range(2):
        with torch.no_grad():
            assert relative_error(skip(x), stock(x)) < 2e-5
        for model in (stock, skip):
            scale = [model[1].weight, model[4].weight]
            for weight in scale:
                weight.grad = torch.ones_like(weight)
            torch.optim.SGD(scale, lr=0.5, fused=True).step()


@pytest.mark.parametrize("budget", [0, 20_000, None])
def test_the_memory_budget_is_kept(budget):
    stock, skip = build("conv_relu", memory_budget=budget)
    check(stock, skip, images(), tolerance=2e-5)
    if budget is not None:
        assert wus_ext.packed_bytes(skip) <= budget
    else:
        assert wus_ext.packed_bytes(skip) > 20_000


@pytest.mark.usefixtures("all_fused")
def test_evaluation_takes_what_training_left_of_the_memory_budget():
    _, unlimited = build("conv_norm_relu", memory_budget=None)
    run(unlimited, images())
    budget = wus_ext.packed_bytes(unlimited)
    stock, skip = build("conv_norm_relu", memory_budget=budget)
    for _ in range(2):
        check(stock.train(), skip.train(), x := images(), tolerance=2e-5)
        assert wus_ext.packed_bytes(skip) == budget
        with torch.no_grad():
            assert relative_error(skip.eval()(x), stock.eval()(x)) < 2e-5
        assert wus_ext.packed_bytes(skip) == budget


def test_f2_fits_where_f4_does_not():
    form = Form("winograd", int(Scheme.F2))
    budget = packed_nbytes(CHAINS["conv_relu"]()[2].weight, form)
    _, skip = build("conv_relu", memory_budget=budget)
    run(skip, images())
    assert wus_ext.packed_bytes(skip) == budget
