"""What this machine and this build can do, in the words of ``wus-ext info``."""

from __future__ import annotations

import platform
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from ._build import build_info

_CPUINFO = Path("/proc/cpuinfo")
#: What a processor must name before we do: instruction sets of our kernels and of oneDNN's.
_FEATURES = {
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_bf16": {"avx512_bf16"},
    "avx512_fp16": {"avx512_fp16"},
    "amx_bf16": {"amx_tile", "amx_bf16"},
    "neon": {"asimd"},
    "neon_bf16": {"bf16"},
}
_CPU_KERNELS = {
    "avx512": "fast: float32 steps on the CPU, by AVX-512 kernels",
    "avx2": "fast: float32 steps on the CPU, by AVX2 kernels",
    "generic": "no faster than stock, maybe: steps on the CPU, by kernels in plain C++",
}
_BF16 = ("avx512_bf16", "amx_bf16", "neon_bf16")


def processor(cpuinfo: str) -> tuple[str, list[str]]:
    """A processor's name and which of the features that matter here it has.

    Args:
        cpuinfo: the text of ``/proc/cpuinfo``; empty where there is none.
    """
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    named = set(fields.get("flags", fields.get("Features", "")).split())
    features = [feature for feature, needed in _FEATURES.items() if needed <= named]
    return fields.get("model name") or platform.processor() or platform.machine(), features


def what_is_fast(build: dict[str, Any], features: Collection[str], gpus: int) -> list[str]:
    """One line each for float32 on the CPU, bfloat16 on the CPU and GPUs.

    Args:
        build: as :func:`wus_ext.build_info` gives it.
        features: of the processor.
        gpus: how many torch sees.
    """
    lines = [_CPU_KERNELS[build["cpu_capability"]]]
    by = [feature for feature in features if feature in _BF16]
    lines.append(
        f"fast: bfloat16 steps on the CPU, by torch's products with {' and '.join(by)}"
        if by
        else "slow: bfloat16 on the CPU, for which this processor has no instructions"
    )
    if gpus and build["cuda"] is None:
        lines.append(f"stock PyTorch's speed: GPUs, since there is no CUDA part ({_why(build)})")
    elif gpus:
        lines.append("fused: steps on the GPU")
    return lines


def describe() -> dict[str, str]:
    """What ``wus-ext info`` prints, by name."""
    build = build_info()
    name, features = processor(_CPUINFO.read_text() if _CPUINFO.exists() else "")
    gpus = [torch.cuda.get_device_name(gpu) for gpu in range(torch.cuda.device_count())]
    cuda = build["cuda"] and f"{build['cuda']}, for {build['cuda_archs']}"
    return {
        "wus_ext": build["version"],
        "python": build["python"],
        "torch": torch.__version__,
        "processor": f"{name} ({', '.join(features) or 'no vector instructions that are used'})",
        "threads": str(torch.get_num_threads()),
        "CPU kernels": build["cpu_capability"],
        "CUDA part": cuda or f"not built: {_why(build)}",
        "GPUs": ", ".join(gpus) or "none",
        "here": "; ".join(what_is_fast(build, features, len(gpus))),
    }


def _why(build: dict[str, Any]) -> str:
    return str(build["without_cuda"])
