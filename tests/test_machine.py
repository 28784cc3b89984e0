"""What `wus-ext info` says of processors and builds that are not at hand."""

import pytest

import wus_ext
from wus_ext._machine import describe, processor, what_is_fast

XEON = """\
processor\t: 0
model name\t: Intel(R) Xeon(R) Processor
flags\t\t: fpu avx avx2 fma avx512f avx512dq avx512bw avx512vl avx512_bf16 amx_bf16 amx_tile

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
CPU = {"cpu_capability": "avx512", "cuda": None, "without_cuda": "FORCE_CPU=1"}
GPU = {**CPU, "cuda": "13.0", "without_cuda": None}


@pytest.mark.parametrize(
    ("cpuinfo", "features"),
    [
        (XEON, ["avx2", "avx512", "avx512_bf16", "amx_bf16"]),
        (XEON.replace("avx512vl", ""), ["avx2", "avx512_bf16", "amx_bf16"]),
        (XEON.replace("fma", "").replace("amx_tile", ""), ["avx512", "avx512_bf16"]),
        ("Features\t: fp asimd bf16", ["neon", "neon_bf16"]),
        ("", []),
    ],
    ids=["xeon", "no_vl", "no_fma_no_tile", "arm", "none"],
)
def test_features(cpuinfo, features):
    name, found = processor(cpuinfo)
    assert found == features
    assert name.startswith("Intel") if cpuinfo.startswith("processor") else name


@pytest.mark.parametrize(
    ("build", "features", "gpus", "lines"),
    [
        (CPU, ["avx512"], 0, ["float32 steps on the CPU, by AVX-512", "slow: bfloat16"]),
        (
            {**CPU, "cpu_capability": "generic"},
            ["avx2", "avx512_bf16", "amx_bf16"],
            0,
            ["plain C++", "by torch's products with avx512_bf16 and amx_bf16"],
        ),
        (CPU, [], 1, ["AVX-512", "slow", "GPUs, since there is no CUDA part (FORCE_CPU=1)"]),
        (GPU, [], 2, ["AVX-512", "slow", "fused: steps on the GPU"]),
    ],
    ids=["cpu", "generic_bf16", "gpu_without_cuda", "gpu"],
)
def test_what_is_fast(build, features, gpus, lines):
    told = what_is_fast(build, features, gpus)
    assert len(told) == len(lines)
    assert all(part in line for part, line in zip(lines, told, strict=True))


def test_this_machine():
    told = describe()
    build = wus_ext.build_info()
    assert told["wus_ext"] == wus_ext.__version__
    assert told["CPU kernels"] == build["cpu_capability"]
    assert all(isinstance(value, str) and "\n" not in value for value in told.values())
