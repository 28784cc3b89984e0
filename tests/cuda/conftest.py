from __future__ import annotations

import pytest
import torch

import wus_ext
from wus_ext.engine import activation, autograd, plan, support
from wus_ext.engine import chains as chain_functions
from wus_ext.engine import linear as products
from wus_ext.engine.conv import choice

from . import emulator

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Gpu:
    """Where the CUDA kernels run: ``ops`` take tensors of ``device``; a call moves one there."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.ops = torch.ops.wus if device == "cuda" else emulator.load()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.device)


def need_gpu() -> None:
    if wus_ext.build_info()["cuda"] is None:
        pytest.skip("wus_ext was built without CUDA")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")


@pytest.fixture(params=["emulated", "cuda"])
def gpu(request, monkeypatch) -> Gpu:
    if request.param == "emulated":
        return Gpu("cpu")
    need_gpu()
    # Float32 is compared to its own precision: no convolution in TF32.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return Gpu("cuda")


@pytest.fixture
def chains(gpu, monkeypatch) -> Gpu:
    """The device of the chains, which take the algorithms and kernels for GPUs there."""
    if gpu.device == "cpu":
        monkeypatch.setitem(support.TYPES, "cpu", FLOATS)
        for module in (choice, plan, products):
            monkeypatch.setattr(module, "on_gpu", lambda tensor: True)
        for module in (activation, autograd):
            monkeypatch.setattr(module, "ops", gpu.ops)
        for module in (chain_functions, choice, plan):
            monkeypatch.setattr(module, "KERNELS", emulator.NAMESPACE)
    return gpu


@pytest.fixture
def real_gpu() -> None:
    need_gpu()
