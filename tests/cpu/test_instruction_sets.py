"""The kernels again, with the instruction sets that this CPU would not choose."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import wus_ext

HERE = Path(__file__).parent
FILES = [
    "test_activation.py",
    "test_pool.py",
    "test_dropout.py",
    "test_batch_norm.py",
    "test_depthwise.py",
    "test_gate.py",
    "test_linear.py",
    "test_pointwise.py",
    "test_exact_zeros.py",
    "test_range.py",
]


@pytest.mark.parametrize(("capability", "chosen"), [("avx2", "avx2"), ("default", "generic")])
def test_kernels(capability, chosen):
    if wus_ext.build_info()["cpu_capability"] == "generic":
        pytest.skip("this CPU has only the generic kernels")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    script = (
        "import pytest, sys, wus_ext\n"
        f"assert wus_ext.build_info()['cpu_capability'] == {chosen!r}\n"
        "sys.exit(pytest.main(sys.argv[1:]))\n"
    )
    files = [str(HERE / name) for name in FILES]
    result = subprocess.run(
        [sys.executable, "-c", script, "-q", "-x", "-p", "no:cacheprovider", *files],
        env=environment,
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
