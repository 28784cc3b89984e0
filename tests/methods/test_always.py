"""Fine-tuning: every step skips, the last layer trains."""

import pytest
import torch
from torch import nn

import wus_ext
from wus_ext.methods.always import AlwaysSkip, last_layer


class Tokens(nn.Module):
    """Parameters of its own beside its layers, as vision transformers have them."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(4))
        self.body = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(x + self.position))


def trained(model):
    model.zero_grad()
    model(torch.randn(3, 4)).square().sum().backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}


HEAD = {"head.weight", "head.bias"}
BIASES = {"body.0.bias", "body.1.bias"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, HEAD | BIASES),
        ({"skip_biases": True}, HEAD),
        ({"layers": "body"}, HEAD | BIASES | {"position"}),
        (
            {"layers": "body.0", "skip_biases": True},
            HEAD | {"position", "body.1.weight", "body.1.bias"},
        ),
        (
            {"layers": lambda name, module: name == "head"},
            {"head.bias", "position", "body.0.weight", "body.1.weight", *BIASES},
        ),
    ],
)
def test_what_trains(options, expected):
    model = wus_ext.convert(Tokens())
    policy = AlwaysSkip(model, **options)
    assert trained(model) == expected
    assert policy.step(50.0)
    assert policy.skipping
    assert trained(model) == expected


def test_it_has_no_state_but_switches_when_one_is_loaded():
    model = wus_ext.convert(Tokens())
    policy = AlwaysSkip(model, skip_biases=True)
    assert policy.state_dict() == {}
    wus_ext.set_skip(model, False)
    policy.load_state_dict({})
    assert trained(model) == HEAD
    with pytest.raises(ValueError, match=r"must be empty, got .'history'"):
        policy.load_state_dict({"history": []})


def test_nothing_to_train_is_refused_and_switched_off():
    model = wus_ext.convert(Tokens())
    with pytest.raises(ValueError, match="layers: nothing trains: leave some layers out"):
        AlwaysSkip(model, layers=["*"], skip_biases=True)
    assert not wus_ext.is_skipping(model)


def test_the_last_layer():
    assert last_layer(Tokens()) == "head"
    model = Tokens()
    model.get_classifier = lambda: model.body[0]
    assert last_layer(model) == "body.0"
    model.get_classifier = nn.Identity
    assert last_layer(model) == "head"
    with pytest.raises(ValueError, match="no last linear layer"):
        last_layer(nn.Sequential(nn.BatchNorm1d(3)))


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "densenet121", "vit_b_16"])
def test_the_last_layer_of_torchvisions_networks(name):
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        model = models.get_model(name, num_classes=7)
    assert model.get_submodule(last_layer(model)).weight.shape[0] == 7
