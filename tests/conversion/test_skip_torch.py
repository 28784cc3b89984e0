"""Converted models under the rest of PyTorch: compile, fx, func, checkpoint, autocast, DDP."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import wus_ext
from tests.cases import assert_near
from tests.conversion.skipping import BIASES, Net, backward, images, net, with_gradient


def plain() -> nn.Sequential:
    """Drop-in layers only."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 36, 3),
    )


def test_fx_takes_drop_ins_for_leaves():
    model = wus_ext.convert(plain())
    traced = fx.symbolic_trace(model)
    layers = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert layers == ["0", "1", "2", "3", "4"]
    x = images()
    assert torch.equal(traced.eval()(x), model.eval()(x))
    wus_ext.set_skip(traced, True)
    backward(traced)
    assert with_gradient(traced) == {"0.bias", "1.bias", "4.bias"}


def test_fx_sees_the_signature():
    traced = fx.symbolic_trace(net())
    names = [node.name for node in traced.graph.nodes if node.op == "placeholder"]
    assert names == ["x", "gain"]


def test_a_converted_graph_module():
    import copy

    model = wus_ext.convert(fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU())))
    for made in (model, copy.deepcopy(model)):
        wus_ext.set_skip(made, True)
        backward(made)
        assert with_gradient(made) == {"0.bias"}


@pytest.mark.parametrize("skip", [True, False])
def test_functional_call(skip):
    model = net()
    wus_ext.set_skip(model, skip)
    given = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    torch.func.functional_call(model, given, (images(),)).sum().backward()
    assert with_gradient(model) == set()
    got = {name for name, tensor in given.items() if tensor.grad is not None}
    assert got == (BIASES if skip else set(given))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.block = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Dropout(), nn.Conv1d(4, 4, 1))
        self.last = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.reentrant = reentrant

    def forward(self, x):
        x = checkpoint(self.block, self.first(x)[..., None], use_reentrant=self.reentrant)
        return checkpoint(self.last, x[..., 0], use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant):
    model, stock = wus_ext.convert(Checkpointed(reentrant)), Checkpointed(reentrant)
    stock.load_state_dict(model.state_dict())
    x = torch.randn(2, 3)
    with wus_ext.skip_weight_updates(model):
        for module in (model, stock):
            torch.manual_seed(1)
            module(x).square().sum().backward()
    biases = {name for name, _ in model.named_parameters() if "bias" in name}
    assert with_gradient(model) == biases
    for name in biases:
        assert_near(model.get_parameter(name).grad, stock.get_parameter(name).grad, name)
    backward(model, x)
    assert with_gradient(model) == {name for name, _ in model.named_parameters()}


def test_autocast_and_grad_scaler():
    model, stock = wus_ext.convert(plain()), plain()
    stock.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wus_ext.set_skip(model, True)
    x = images()
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = model(x), stock(x)
        loss = output.float().square().sum()
    assert output.dtype == expected.dtype == torch.bfloat16
    assert_near(output, expected, "output")
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"0.bias", "1.bias", "4.bias"}


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("inside", [True, False], ids=["convert_inside", "convert_outside"])
@pytest.mark.parametrize("view", [True, False], ids=["bucket_view", "no_view"])
@pytest.mark.parametrize("unused", [True, False], ids=["find_unused", "no_find_unused"])
def test_distributed_data_parallel(inside, view, unused):
    model = Net()
    if inside:
        wus_ext.convert(model)
    wrapped = DistributedDataParallel(
        model, find_unused_parameters=unused, gradient_as_bucket_view=view
    )
    assert wus_ext.convert(wrapped) is wrapped
    everything = {name for name, _ in model.named_parameters()}
    for skip in (False, True, True, False):
        wus_ext.set_skip(wrapped, skip)
        assert wus_ext.is_skipping(model) is skip
        wrapped.zero_grad()
        backward(wrapped)
        assert with_gradient(model) == (BIASES if skip else everything)


@pytest.mark.usefixtures("one_process")
def test_layers_have_their_own_names_inside_a_wrapper():
    model = net()
    for wrapped in (
        DistributedDataParallel(model, find_unused_parameters=True),
        nn.DataParallel(model),
        torch.compile(model, backend="eager"),
    ):
        with wus_ext.skip_weight_updates(wrapped, layers="conv"):
            model.zero_grad()
            backward(wrapped)
        everything = {name for name, _ in model.named_parameters()}
        assert with_gradient(model) == everything - {"conv.weight"}
