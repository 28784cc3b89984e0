"""Other people's models, converted: whole steps against stock PyTorch.

A skip step in float64 has stock's own arithmetic and must agree closely. In float32 the fused
kernels round in their own way, deep networks under batch norm amplify that, and a ReLU that lands
on the other side of its kink changes a gradient visibly: what forward computes must be as near as
rounding allows, and every gradient still be the same gradient.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import wus_ext
from tests.integrations.zoo import CASES, Case, Inputs, call, freeze, saved_bytes

Tensors = dict[str, Tensor]


def step(
    model: nn.Module, inputs: Inputs, grad_outputs: list[Tensor] | None = None
) -> tuple[Tensors, list[Tensor]]:
    """Everything that one step computes, and its random upstream gradients."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    outputs = call(model, inputs)
    if grad_outputs is None:
        grad_outputs = [torch.randn_like(output) for output in outputs]
    torch.autograd.backward(outputs, grad_outputs)
    grads = {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return forward_tensors(model, outputs) | grads, grad_outputs


def forward_tensors(model: nn.Module, outputs: list[Tensor]) -> Tensors:
    tensors = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return tensors | {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}


def distances(got: Tensors, wanted: Tensors) -> dict[str, float]:
    """Relative distance of each tensor; of gradients that are tiny, to the largest one."""
    norms = {name: tensor.double().norm().item() for name, tensor in wanted.items()}
    largest = max((norm for name, norm in norms.items() if name.startswith("grad")), default=0.0)
    found = {}
    for name, tensor in wanted.items():
        floor = 1e-2 * largest if name.startswith("grad") else 1e-6
        error = (got[name].double() - tensor.double()).norm().item()
        found[name] = error / max(norms[name], floor)
    return found


def rounding(stock: nn.Module, inputs: Inputs, wanted: Tensors) -> float:
    """How far forward moves when every parameter moves by the rounding of a convolution."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.mul_(1 + 2e-6 * torch.randn(parameter.shape, generator=generator))
    torch.manual_seed(1)
    outputs = call(stock, inputs)
    forward = forward_tensors(stock, outputs)
    return max(distances(forward, {name: wanted[name] for name in forward}).values())


def doubled(inputs: Inputs) -> Inputs:
    def double(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    if isinstance(inputs, dict):
        return {name: double(tensor) for name, tensor in inputs.items()}
    return tuple(map(double, inputs))


def holds_frozen(model: nn.Module) -> bool:
    return any(
        isinstance(layer, nn.Conv2d | nn.Linear) and not layer.weight.requires_grad
        for layer in model.modules()
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_equal_stocks(case: Case):
    stock = case.build()
    inputs = case.inputs()
    model = wus_ext.convert(copy.deepcopy(stock))

    # a full step, bit for bit unless some weights are at requires_grad=False: these stand still
    before = copy.deepcopy(stock)
    wanted, grad_outputs = step(stock, inputs)
    got, _ = step(model, inputs, grad_outputs)
    assert got.keys() == wanted.keys()
    if holds_frozen(stock):
        near = 3 * rounding(before, inputs, wanted)
        for name, distance in distances(got, wanted).items():
            assert distance <= (0.1 if name.startswith("grad") else near), name
    else:
        for name, tensor in wanted.items():
            assert torch.equal(got[name], tensor), name

    # a skip step, against stock with frozen weights
    wus_ext.set_skip(model, True)
    before = copy.deepcopy(freeze(stock))
    wanted, _ = step(stock, inputs, grad_outputs)
    got, _ = step(model, inputs, grad_outputs)
    assert got.keys() == wanted.keys()
    near = 3 * rounding(before, inputs, wanted)
    assert near < 5e-3, "too ill-conditioned to tell"
    for name, distance in distances(got, wanted).items():
        assert distance <= (0.1 if name.startswith("grad") else near), name

    assert saved_bytes(model, inputs) <= case.saved * saved_bytes(stock, inputs)

    # the same in float64
    stock.double().load_state_dict(model.double().state_dict())
    inputs, grad_outputs = doubled(inputs), [grad.double() for grad in grad_outputs]
    wanted, _ = step(stock, inputs, grad_outputs)
    got, _ = step(model, inputs, grad_outputs)
    assert got.keys() == wanted.keys()
    for name, distance in distances(got, wanted).items():
        assert distance <= 1e-9, name
