"""What wus_ext.profile measures, says, and leaves as it was."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import wus_ext
from wus_ext.cli.command import main
from wus_ext.profiling.saved import peak_bytes, saving

KINDS = {
    *("stock full", "stock frozen", "skip", "input gradients", "fused full"),
    *("stock evaluation", "evaluation"),
}


def network():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU6(),
        nn.Conv2d(16, 16, 3, padding="same"), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 4),
    )  # fmt: skip


X = torch.randn(2, 3, 8, 8)


@pytest.fixture(scope="module")
def result():
    return wus_ext.profile(network(), X, rounds=2)


def test_every_kind_of_step_is_measured(result):
    assert set(result.steps) == KINDS
    for kind, step in result.steps.items():
        assert step.milliseconds > 0
        assert step.spread >= 0
        assert (step.saved > 0) == ("evaluation" not in kind)
        assert step.peak > 0


def test_memory_is_what_it_is_known_to_be(result):
    weights = sum(p.nbytes for p in network().parameters())
    biases = sum(p.nbytes for name, p in network().named_parameters() if name.endswith("bias"))
    assert result.steps["stock full"].gradients == weights
    assert result.steps["stock frozen"].gradients == biases
    assert result.steps["skip"].gradients == biases
    assert result.steps["input gradients"].gradients == 0
    assert result.steps["skip"].saved < result.steps["stock frozen"].saved
    step = result.steps["skip"]
    assert step.held == step.saved + step.transformed + step.gradients


def test_layers_say_how_they_run_and_why_not(result):
    layers = {layer.name: layer for layer in result.layers}
    assert layers["0"].chain == "conv norm relu"
    assert layers["3"].chain == "conv relu6"
    assert layers["3"].algorithm == "depthwise"
    assert layers["5"].chain == ""
    assert "padding='same'" in layers["5"].note
    assert layers["8"].chain == "linear"


def test_it_reads_as_a_table(result):
    text = str(result)
    for word in (*KINDS, "conv norm relu", "depthwise", "padding='same'"):
        assert word in text
    assert text.endswith(result.advice)
    assert "1 of 4 layers run by themselves" in result.advice


@pytest.mark.parametrize("converted", [False, True])
def test_the_model_is_left_as_it_was(converted):
    model = network()
    if converted:
        wus_ext.convert(model)
        wus_ext.set_skip(model, True)
    model(X).sum().backward()
    before = copy.deepcopy(model.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    wus_ext.profile(model, X, rounds=1)
    assert torch.equal(torch.rand(3), expected)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)
    assert model.training
    if converted:
        assert wus_ext.is_skipping(model)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, *, scale):
        return {"logits": self.layer(x) * scale, "kept": [x]}


def test_other_inputs_outputs_and_losses():
    example = {"x": torch.randn(2, 4), "scale": torch.tensor(2.0)}
    assert wus_ext.profile(Named(), example, rounds=1).layers[0].chain == "linear"
    calls = []

    def loss(output):
        calls.append(output)
        return output["logits"].square().sum()

    wus_ext.profile(Named(), example, rounds=1, loss=loss)
    assert calls


def test_bf16_is_measured_on_demand():
    result = wus_ext.profile(network(), X, rounds=1, bf16=True)
    assert {kind for kind in result.steps if kind.endswith(" bf16")} == {
        f"{kind} bf16" for kind in KINDS if "evaluation" not in kind
    }


def test_a_forward_hook_is_named():
    model = network()
    model[0].register_forward_hook(lambda module, args, output: output.mean() and None)
    layer = next(layer for layer in wus_ext.profile(model, X, rounds=1).layers if layer.name == "0")
    assert not layer.chain
    assert layer.note == "a hook of its own sees it"


@pytest.mark.parametrize(
    ("example", "settings", "message"),
    [
        (X, {"rounds": 0}, "rounds: expected a number from 1 up"),
        ("x", {}, "example: expected a tensor"),
        ((), {}, "example: expected a tensor"),
        (X, {"algo": "f3"}, "algo: 'f3'"),
    ],
)
def test_bad_input(example, settings, message):
    with pytest.raises(ValueError, match=message):
        wus_ext.profile(network(), example, **settings)


def test_an_output_without_gradients_asks_for_a_loss():
    class Numbers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x).argmax(1)

    with pytest.raises(ValueError, match="give a loss"):
        wus_ext.profile(Numbers(), torch.randn(2, 4))


@pytest.mark.parametrize("skip", [None, False, True], ids=["stock", "fused", "skip"])
def test_counting_what_is_saved_keeps_nothing_of_it(skip):
    """A graph whose saved output held itself would never go."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Tanh())
    if skip is not None:
        wus_ext.set_skip(wus_ext.convert(model, full="fused"), skip)
    with saving(model.parameters()) as saved:
        output = model(X)
    assert saved() > 0
    last = weakref.ref(output)
    del output
    gc.collect()
    assert last() is None


def test_the_peak_is_the_most_at_one_time():
    def call():
        first = torch.empty(1 << 20)
        second = first + 1
        del first
        return second * 2

    assert 8 << 20 <= peak_bytes(call, torch.device("cpu")) < 12 << 20


def test_the_command_line(capsys):
    assert main(["profile", "--model", "alexnet", "--batch-size", "2", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert "stock full" in out
    assert "conv relu pool" in out
    assert main(["profile", "--rounds", "0"]) == 2
    assert main(["profile", "--model", "torchvision:nothing"]) == 2
