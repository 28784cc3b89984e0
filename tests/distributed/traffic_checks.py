"""The bytes that whole networks send in full and skip steps."""

from __future__ import annotations

import torch
import torch.distributed as dist

import wus_ext

from .replicas import DEVICE, Traffic, loss, wrapped


def traffic(ddp, skip):
    wus_ext.set_skip(ddp, skip)
    ddp.zero_grad()
    with Traffic() as counted:
        loss(ddp(torch.randn(2, 3, 32, 32, device=DEVICE))).backward()
    return counted


def send(build):
    ddp = wrapped(wus_ext.convert(build()))
    traffic(ddp, False)  # builds the buckets anew
    full, skip = traffic(ddp, False), traffic(ddp, True)
    everything = sum(p.numel() * 4 for p in ddp.parameters())
    assert full.bytes.total() >= everything
    assert 0 < skip.bytes.total() < full.bytes.total() / 100, (skip.bytes, full.bytes)
    assert skip.calls.count("allreduce_") == 1
    if dist.get_rank() == 0:
        print(f"{build.__name__}: full {dict(full.bytes)}, skip {dict(skip.bytes)} bytes")


def check_bytes_of_vgg16():
    send(wus_ext.models.vgg16)


def check_bytes_of_resnet18():
    send(wus_ext.models.resnet18)
