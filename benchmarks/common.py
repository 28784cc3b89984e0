"""What every benchmark shares: the variants of a network, interleaved medians, a table."""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F

import wus_ext
from wus_ext.nn import is_bias
from wus_ext.profiling.saved import saving

NETWORKS = {
    "alexnet": lambda: wus_ext.models.alexnet(),
    "vgg11": lambda: wus_ext.models.vgg11(),
    "vgg11_bn": lambda: wus_ext.models.vgg11(batch_norm=True),
    "vgg16": lambda: wus_ext.models.vgg16(),
    "vgg16_bn": lambda: wus_ext.models.vgg16(batch_norm=True),
    "resnet18": lambda: wus_ext.models.resnet18(),
}
TUNED_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
}


class TrainingStep:
    """zero_grad, forward, cross-entropy, backward, SGD with momentum and weight decay.

    With an ``amp`` forward and loss run under autocast.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        input: torch.Tensor,
        target: torch.Tensor,
        amp: torch.dtype | None = None,
    ) -> None:
        self.model, self.input, self.target, self.amp = model, input, target, amp
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            lr=1e-4,
            momentum=0.9,
            weight_decay=5e-4,
            fused=True,
        )

    def loss(self) -> torch.Tensor:
        device = self.input.device.type
        with torch.autocast(device, dtype=self.amp, enabled=self.amp is not None):
            return F.cross_entropy(self.model(self.input), self.target)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()
        if self.input.is_cuda:
            torch.cuda.synchronize()


def batch(size: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images and labels; the same for every variant."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 10, (size,), generator=generator)
    return images.to(device), labels.to(device)


def freeze(model: torch.nn.Module) -> torch.nn.Module:
    """Stock PyTorch's way: everything but the biases stops requiring gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_bias(name))
    return model


def saved_bytes(forward: Callable[[], object], kept: Iterable[torch.Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once.

    Args:
        forward: returns what holds the graph.
        kept: what lives anyway and does not count: parameters, buffers, inputs.
    """
    with saving(kept) as saved:
        forward()
    return saved()


def median_ms(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e3


def machine() -> str:
    """Device and versions in one line, for the head of every table."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return (
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"wus_ext {wus_ext.__version__} ({wus_ext.build_info()['cpu_capability']}), "
        f"Python {platform.python_version()}, malloc {malloc()}"
        + (f", oneDNN at most {isa}" if (isa := os.environ.get("ONEDNN_MAX_CPU_ISA")) else "")
    )


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def malloc() -> str:
    return "tuned" if all(os.environ.get(k) == v for k, v in TUNED_MALLOC.items()) else "default"


def use_tuned_malloc() -> None:
    """Starts this program anew with glibc told to keep large blocks; returns if it was."""
    if malloc() != "tuned":
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **TUNED_MALLOC})


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns."""
    lines = [header, ["---"] * len(header), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )
