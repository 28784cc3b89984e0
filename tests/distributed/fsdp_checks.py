"""FSDP2: a model's parameters are sharded; a skip step reduces the gradients of biases only."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)

import wus_ext

from .replicas import DEVICE, WINDOWS, Net, Traffic, batch, loss, mean_backward, refused


class Deep(nn.Module):
    """Chains that a skip program fuses, and blocks that are sharded on their own."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.head = Net(norm=False).head
        self.head[1] = nn.Linear(32, 6)
        self.gain = nn.Parameter(torch.rand(2))

    def forward(self, x):
        return self.head(self.body(self.stem(x))) * self.gain


def shard(model, nested, **options):
    for block in [model.body, model.head] if nested else []:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def sharded(*, first, nested, pattern="FSSFSF", **options):
    """`first`: whether the model is converted before it is sharded, or after."""
    torch.manual_seed(0)
    model = Deep().to(DEVICE)
    expected = wus_ext.convert(copy.deepcopy(model))
    if first:
        wus_ext.convert(model)
    shard(model, nested, **options)
    if not first:
        wus_ext.convert(model)
    optimizers = [
        torch.optim.SGD(m.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
        for m in (model, expected)
    ]
    sent = {}
    for step, kind in enumerate(pattern):
        for m in (model, expected):
            wus_ext.set_skip(m, kind == "S")
            m.zero_grad()
        with Traffic() as traffic:
            loss(model(batch(step))).backward()
        sent[kind] = traffic.bytes
        mean_backward(expected, step)
        for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if q.grad is not None:
                torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-4, atol=1e-6)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-4, atol=1e-6)
    return sent


def check_fully_shard():
    for first in (True, False):
        for nested in (True, False):
            for reshard in (True, False):
                sharded(first=first, nested=nested, reshard_after_forward=reshard)


def check_fully_shard_reduces_gradients_of_biases_only():
    sent = sharded(first=True, nested=True)
    world = dist.get_world_size()
    if world == 1:
        return  # nothing to reduce
    padded = sum(world * -(-p.shape[0] // world) * p[0].numel() for p in Deep().parameters())
    biases = [p for name, p in Deep().named_parameters() if name.endswith("bias")]
    padded_biases = sum(world * -(-p.shape[0] // world) for p in biases)
    reduced = {kind: bytes["_reduce_scatter_base_"] for kind, bytes in sent.items()}
    once = 4 * (world + 1) / world  # float32, input and output of a reduce-scatter
    assert reduced == {"F": once * padded, "S": once * padded_biases}


def check_fully_shard_without_a_backward_pass():
    """Blocks whose parameters stay gathered between forward passes, in windows of every kind."""
    for reshard in (True, False):
        torch.manual_seed(0)
        model = wus_ext.convert(Deep().to(DEVICE))
        expected = copy.deepcopy(model)
        shard(model, nested=True, reshard_after_forward=reshard)
        for kind, window in WINDOWS.items():
            for m in (model, expected):
                m.zero_grad()
                window = {**window, "layers": "body"} if "layers" in window else window
                with wus_ext.skip_weight_updates(m, **window):
                    with torch.no_grad():
                        m(batch(0)), m(batch(1))
                    if m is model:
                        images = batch(2).requires_grad_()
                        (loss(m(images)) + loss(m(images))).backward()
                    elif kind != "input_only":
                        mean_backward(m, 2, 2.0)
            for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None), name
                if q.grad is not None:
                    torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-4, atol=1e-6)


class Uses(nn.Module):
    """Uses its layer's weight, of which it has none of its own, without a call of the layer."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(75, 75), nn.LayerNorm(75)

    def forward(self, x):
        return self.norm(nn.functional.linear(x.flatten(1), self.layer.weight, self.layer.bias))


def check_fully_shard_of_a_block_that_uses_weights_of_its_layers():
    for first in (True, False):
        for gamma in (True, False):
            model = nn.Sequential(Uses(), nn.Linear(75, 2)).to(DEVICE)
            for do in (0, 1) if first else (1, 0):
                if do == 0:
                    wus_ext.convert(model, skip_gamma=gamma)
                else:
                    fully_shard(model[0])
                    fully_shard(model)
            biases = {"0.layer.bias", "0.norm.bias", "1.bias"} | (
                set() if gamma else {"0.norm.weight"}
            )
            for window, expected in (({}, biases), ({"skip_biases": True}, set())):
                model.zero_grad()
                with wus_ext.skip_weight_updates(model, **window):
                    loss(model(batch(0).requires_grad_())).backward()
                assert {n for n, p in model.named_parameters() if p.grad is not None} == expected
            loss(model(batch(0))).backward()
            assert all(p.grad is not None for p in model.parameters())


def check_fully_shard_in_mixed_precision():
    torch.manual_seed(0)
    model = wus_ext.convert(Deep().to(DEVICE))
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(model, nested=True, mp_policy=precision)
    wus_ext.set_skip(model, True)
    loss(model(batch(0)).float()).backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == name.endswith("bias"), name


def check_the_older_fsdp_is_refused():
    for use_orig_params in (True, False):
        model = wus_ext.convert(Deep().to(DEVICE))
        wrapper = FullyShardedDataParallel(
            model, use_orig_params=use_orig_params, device_id=torch.device(DEVICE)
        )
        for told in (wrapper, model):
            refused(lambda told=told: wus_ext.set_skip(told, True), "use torch.distributed.fsdp")
