"""Every benchmark finds what it imports."""

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCRIPT = """
import importlib, sys
sys.path[:0] = [sys.argv[1], "."]
for name in sys.argv[2:]:
    importlib.import_module(name)
"""


def test_every_benchmark_imports():
    names = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
    assert names
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, BENCHMARKS, *names],
        cwd=BENCHMARKS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
