"""Classes made at run time: every kind of user class, and every way into a model."""

from __future__ import annotations

import abc
import copy
import enum
import pickle
import typing

import pytest
import torch
from torch import nn

import wus_ext

T = typing.TypeVar("T")


class Base:
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        return self.conv(x) * self.scale


class Slotted:
    __slots__ = ()


class Named(typing.Protocol):
    def name(self) -> str: ...


class Abstract(abc.ABC, Base, nn.Module):
    @abc.abstractmethod
    def kind(self): ...


class Concrete(Abstract):
    def kind(self):
        return enum.Enum


class Typed(typing.Generic[T], Base, nn.Module):
    pass


class Mixed(Slotted, Base, nn.Module):
    pass


class WithProtocol(Base, nn.Module, Named):
    def name(self):
        return type(self).__name__


class Registering(Base, nn.Module):
    made: typing.ClassVar[list] = []

    def __init_subclass__(cls, *, label, **kwargs):
        cls.made.append(label)


class Registered(Registering, label="registered"):
    pass


KINDS = [Concrete, Typed, Mixed, WithProtocol, Registered]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("cls", KINDS)
def test_any_class_converts(cls, inside):
    torch.manual_seed(0)
    model = nn.Sequential(cls()) if inside else cls()
    stock = copy.deepcopy(model)
    module = model[0] if inside else model
    wus_ext.convert(model)
    assert isinstance(module, cls)
    assert (type(module).__name__, type(module).__qualname__) == (cls.__name__, cls.__qualname__)
    assert type(module).__module__ == cls.__module__
    wus_ext.set_skip(model, True)
    x = torch.randn(2, 3, 6, 6)
    output = model(x)
    torch.testing.assert_close(output, stock(x), rtol=1e-4, atol=1e-5)
    output.sum().backward()
    trained = {name.split(".")[-1] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"bias"}
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), output)
    assert type(wus_ext.revert(model)[0] if inside else wus_ext.revert(model)) is cls
    assert Registering.made == ["registered"]


def test_convert_changes_all_or_nothing(monkeypatch):
    class Rigid(nn.Module):
        """Python refuses to give its objects another class."""

        def __setattr__(self, name, value):
            if name == "__class__":
                raise TypeError("rigid")
            super().__setattr__(name, value)

        def forward(self, x):
            return x

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Rigid(), nn.Linear(2, 2))
    before = [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match=r"'Rigid'.*nothing was converted"):
        wus_ext.convert(model)
    assert [type(module) for module in model.modules()] == before
    assert "skip_wgrad" not in vars(model[0])


class Auto(nn.Module):
    """Methods other than forward, and a weight used without its layer."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.parts = nn.ParameterList([nn.Parameter(torch.ones(4))])
        self.rnn = nn.LSTM(4, 4, batch_first=True)

    def encode(self, x):
        return torch.relu(self.encoder(x)) * self.scale * self.parts[0]

    def decode(self, h):
        return self.rnn(h[:, None])[0][:, 0] @ self.encoder.weight

    def forward(self, x):
        return self.decode(self.encode(x))


BIASES = {"encoder.bias", "rnn.bias_ih_l0", "rnn.bias_hh_l0"}


@pytest.mark.parametrize("way", ["forward", "methods", "keywords"])
@pytest.mark.parametrize("skip_biases", [False, True])
def test_all_ways_into_a_model(way, skip_biases):
    torch.manual_seed(0)
    model = Auto()
    stock = copy.deepcopy(model)
    wus_ext.set_skip(wus_ext.convert(model), True, skip_biases=skip_biases)
    x = torch.randn(3, 8, requires_grad=True)
    output = {
        "forward": lambda: model(x),
        "methods": lambda: model.decode(model.encode(x)),
        "keywords": lambda: model.decode(h=model.encode(x=x)),
    }[way]()
    torch.testing.assert_close(output, stock(x), rtol=1e-4, atol=1e-5)
    output.sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == (set() if skip_biases else BIASES)


def test_parameters_are_themselves_outside():
    model = wus_ext.convert(Auto())
    wus_ext.set_skip(model, True)
    assert model.scale is dict(model.named_parameters())["scale"]
    assert isinstance(model.encoder.weight, nn.Parameter)
    assert model.rnn._flat_weights[0] is model.rnn.weight_ih_l0


def test_unconverted_models_share_nothing():
    """A stock model beside a converted one reads no constants."""
    stock, other = Auto(), wus_ext.convert(Auto())
    wus_ext.set_skip(other, True)
    other(torch.randn(2, 8))
    stock(torch.randn(2, 8)).sum().backward()
    assert all(p.grad is not None for p in stock.parameters())
