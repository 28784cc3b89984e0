from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import wus_ext

from . import emulator


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
def real_gpu() -> None:
    need_gpu()


@pytest.fixture
def tf32_products() -> Iterator[None]:
    """Products in TF32 are allowed: few libraries have epilogues for others in float32."""
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "tf32"
    yield
    products.fp32_precision = before
