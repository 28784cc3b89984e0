"""Several threads: models of their own, one model, and a window that opens and closes meanwhile."""

from __future__ import annotations

import copy
import queue
import sys
import threading
import weakref

import pytest
import torch
from torch import nn

import wus_ext
from wus_ext._build import deferral

from .chains import CHAINS, fused_chains, images, relative_error


@pytest.fixture
def threads():
    """Runs functions at once, switching often; what one raises is raised."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def run(*functions):
        errors = []

        def guarded(function):
            try:
                function()
            except BaseException as error:
                errors.append(error)

        running = [threading.Thread(target=guarded, args=(f,)) for f in functions]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        if errors:
            raise errors[0]

    yield run
    sys.setswitchinterval(interval)


def mixed():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(2),
        nn.TransformerEncoderLayer(30, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(240, 4),
    )  # fmt: skip


def test_each_thread_its_own_model(threads):
    stock = mixed().eval()
    x = images()
    expected = stock(x)

    def train(full):
        model = wus_ext.convert(copy.deepcopy(stock), full=full)
        for step in range(30):
            wus_ext.set_skip(model, bool(step % 2))
            output = model(x)
            assert relative_error(output, expected) < 1e-4
            output.sum().backward()

    def serve():
        for _ in range(60):
            assert torch.equal(stock(x), expected)

    threads(lambda: train("stock"), lambda: train("fused"), serve, lambda: train("fused"))


class Meets(nn.Module):
    """Waits in the middle of a forward until another thread is there, too."""

    def __init__(self, barrier):
        super().__init__()
        self.barrier = barrier

    def forward(self, x):
        self.barrier.wait(timeout=30)
        return x


def test_forwards_that_overlap_run_fused_alike(threads):
    barrier = threading.Barrier(2)
    fused = {}

    def run(name):
        layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        model = nn.Sequential(*layers[:1], Meets(barrier), *layers[1:])
        wus_ext.set_skip(wus_ext.convert(model), True)
        fused[name] = fused_chains(model, images())

    threads(lambda: run("one"), lambda: run("other"))
    assert fused["one"] == fused["other"]
    assert len(fused["one"]) == 2


@pytest.mark.parametrize("full", ["stock", "fused"])
def test_one_model_while_windows_open_and_close(threads, full):
    model = wus_ext.convert(mixed().eval(), full=full)
    x = images()
    expected = wus_ext.revert(copy.deepcopy(model))(x).detach()
    names = {name for name, _ in model.named_parameters()}

    def evaluate():
        with torch.no_grad():
            for _ in range(40):
                assert relative_error(model(x), expected) < 1e-4

    def train():
        for _ in range(40):
            assert relative_error(model(x), expected) < 1e-4
            model(x).sum().backward()

    def switch():
        for _ in range(60):
            wus_ext.set_skip(model, True)
            wus_ext.set_skip(model, False)

    threads(evaluate, train, switch, evaluate)
    assert {name for name, _ in model.named_parameters()} == names
    model.zero_grad()
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_tensor_settled_by_another_thread(threads):
    conv = wus_ext.convert(nn.Sequential(nn.Conv2d(8, 8, 3)))
    wus_ext.set_skip(conv, True)
    results = []

    class Threaded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            y = self.conv(x)
            threads(*(lambda: results.append(y.detach().sum()) for _ in range(4)))
            return y.relu()

    model = wus_ext.convert(Threaded())
    wus_ext.set_skip(model, True)
    model(images()).sum().backward()
    assert len(set(map(float, results))) == 1


class Watched(nn.Module):
    """A forward whose tensors another thread looks at while they are still being made."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.seen = queue.SimpleQueue()

    def watched(self, x):
        self.seen.put(x)
        return x

    def forward(self, x):
        y = self.watched(self.first(x))
        z = self.watched(torch.relu(self.watched(self.norms[0](y))))
        z = self.watched(self.norms[1](self.second(z)))
        z = self.watched(z + y)
        return self.watched(self.norms[2](torch.relu(z)))


@pytest.mark.parametrize("skip", [False, True], ids=["fused", "skip"])
def test_another_thread_looks_while_the_chain_grows(threads, skip):
    """What a chain takes in, it takes in before or after the tensor is computed, never halfway."""
    torch.manual_seed(0)
    model = Watched().to(memory_format=torch.channels_last)
    wus_ext.convert(model, full="fused")
    wus_ext.set_skip(model, skip)
    x = images((2, 3, 12, 10))
    grad = torch.randn(2, 8, 12, 10)

    def step():
        model.zero_grad()
        for norm in model.norms:
            norm.reset_running_stats()
        output = model(x)
        output.backward(grad)
        results = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return results | {"output": output.detach()} | dict(model.named_buffers())

    expected = {name: value.clone() for name, value in step().items()}

    def train():
        try:
            for _ in range(60):
                for name, value in step().items():
                    assert relative_error(value, expected[name]) < 1e-4, name
        finally:
            model.seen.put(None)

    def watch():
        while (tensor := model.seen.get()) is not None:
            assert torch.isfinite(tensor).all()

    threads(train, watch)


@pytest.mark.parametrize("name", ["conv_norm_relu_pool", "block", "dropout", "functional"])
def test_nothing_is_left_behind(name):
    model = wus_ext.convert(CHAINS[name](), full="fused")
    layers = [weakref.ref(module) for module in model.modules()]
    outputs = []
    for step in range(4):
        wus_ext.set_skip(model, bool(step % 2))
        output = model(images())
        outputs.append(weakref.ref(output))
        output.sum().backward()
    del output
    assert deferral.engine() is None
    assert not any(output() for output in outputs)
    del model
    assert not any(layer() for layer in layers)


def test_replaced_layers_give_their_copies_back():
    model = wus_ext.convert(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()))
    wus_ext.set_skip(model, True)
    x = images((2, 16, 12, 12))
    model(x)
    before = wus_ext.packed_bytes(model)
    for _ in range(5):
        model[0] = nn.Conv2d(16, 16, 3, padding=1)
        wus_ext.convert(model)
        model(x)
    assert wus_ext.packed_bytes(model) == before


@pytest.mark.parametrize("how", ["functional_call", "parameter", "data"])
def test_a_fresh_weight_at_a_freed_address(how):
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
    model = wus_ext.convert(copy.deepcopy(stock))
    wus_ext.set_skip(model, True)
    x = images((2, 16, 12, 12))
    for _ in range(6):
        weights = {name: nn.Parameter(torch.randn_like(p)) for name, p in stock.named_parameters()}
        with torch.no_grad():
            expected = torch.func.functional_call(stock, weights, x)
            if how == "functional_call":
                actual = torch.func.functional_call(model, weights, x)
            else:
                for name, parameter in weights.items():
                    attribute = name.split(".")[1]
                    if how == "data":
                        getattr(model[0], attribute).data = parameter.data.clone()
                    else:
                        delattr(model[0], attribute)
                        setattr(model[0], attribute, nn.Parameter(parameter.data.clone()))
                actual = model(x)
        assert relative_error(actual, expected) < 1e-5
        del weights, expected, actual
