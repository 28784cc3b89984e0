"""Builds wus_ext._C: the CPU part everywhere, the CUDA part where torch and the machine allow it.

FORCE_CUDA=1 makes a missing CUDA toolkit an error; FORCE_CPU=1 leaves the CUDA part out.
TORCH_CUDA_ARCH_LIST chooses the GPU architectures (default: 8.0 9.0 10.0+PTX).
WUS_INSTRUMENT=address, thread or coverage builds for `make sanitize`, `make sanitize-threads` and
`make coverage`. MAX_JOBS bounds how many files are compiled at a time.
"""

import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools

OLDEST_SETUPTOOLS = 77
if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    sys.exit(
        f"wus_ext needs setuptools {OLDEST_SETUPTOOLS} or newer to build, and "
        f'{setuptools.__version__} is installed: pip install "setuptools>={OLDEST_SETUPTOOLS}"'
    )

try:
    import torch
except ImportError:
    sys.exit(
        "wus_ext is built against the installed torch, and none was found: "
        "pip install torch, then pip install --no-build-isolation ."
    )

ROOT = Path(__file__).parent.resolve()
DEFAULT_ARCHS = "8.0 9.0 10.0+PTX"
CXX_FLAGS = [
    *("-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fno-trapping-math"),
    *("-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"),
    "-Wno-maybe-uninitialized",  # g++ 12 takes its own AVX-512 headers for suspects
]
#: For the compiler, and for the linker as well; WUS_INSTRUMENT chooses.
INSTRUMENTS = {
    "": ([], ["-fopenmp"]),
    "address": (
        ["-O1", "-g1"],
        ["-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    ),
    "thread": (["-O1", "-g1", "-include", "cpu/visible_threads.h"], ["-fsanitize=thread"]),
    "coverage": (["-O1"], ["-fopenmp", "--coverage"]),
}
INSTRUMENT = os.environ.get("WUS_INSTRUMENT", "")
if INSTRUMENT not in INSTRUMENTS:
    sys.exit(
        f"wus_ext: WUS_INSTRUMENT={INSTRUMENT!r} is none of {', '.join(filter(None, INSTRUMENTS))}"
    )
#: Seconds of one core, about, for what is compiled: the CPU part, a CUDA file for an architecture.
CPU_SECONDS, CUDA_SECONDS = 200, 15


def toolkits():
    """Where a CUDA toolkit may be: the environment's, the system's, pip's."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            yield Path(os.environ[name])
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        yield Path(nvcc).resolve().parent.parent
    yield Path("/usr/local/cuda").resolve()
    major = (torch.version.cuda or "0").split(".")[0]
    for packages in (sysconfig.get_paths()["purelib"], Path(torch.__file__).parents[1]):
        yield Path(packages, "nvidia", f"cu{major}")


def why_unusable(home):
    """None when `home` can build for this torch, else the reason in a few words."""
    nvcc = home / "bin" / "nvcc"
    if not nvcc.exists():
        return "no nvcc"
    for header in ("cuda_runtime.h", "cublas_v2.h", "cusparse.h", "cusolverDn.h"):
        if not (home / "include" / header).exists():
            return f"no {header}"
    try:
        printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return "nvcc does not run"
    release = re.search(r"release (\d+)\.", printed)
    if release is None:
        return "nvcc does not run"
    if release[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc is CUDA {release[1]}, torch was built with {torch.version.cuda}"
    return None


def find_cuda():
    """The toolkit to build with and None, or None and why it is a CPU-only build; says so, too."""
    if os.environ.get("FORCE_CPU") == "1":
        return without_cuda("FORCE_CPU=1")
    if torch.version.cuda is None:
        problems = ["this torch has no CUDA"]
    else:
        problems = []
        for home in dict.fromkeys(toolkits()):
            problem = why_unusable(home)
            if problem is None:
                passed_over = f" (not {'; '.join(problems)})" if problems else ""
                print(f"wus_ext: building for CPU and CUDA with {home}{passed_over}")
                return home, None
            problems.append(f"{home}: {problem}")
    reason = "; ".join(problems)
    if os.environ.get("FORCE_CUDA") == "1":
        version = torch.version.cuda
        hint = (
            f'; try: pip install "cuda-toolkit[nvcc,nvvm,crt,cccl,cudart]=={version}.*"'
            if version
            else ""
        )
        sys.exit(f"wus_ext: FORCE_CUDA=1, but no usable CUDA toolkit was found ({reason}){hint}")
    return without_cuda(reason)


def without_cuda(reason):
    print(f"wus_ext: building for CPU only ({reason})")
    return None, reason


def cudart_directory(home):
    """A directory with libcudart.so; pip's toolkit holds only libcudart.so.<major>."""
    for folder in (home / "lib64", home / "lib"):
        if (folder / "libcudart.so").exists():
            return folder
    link = ROOT / "build" / "cudart" / "libcudart.so"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(next((home / "lib").glob("libcudart.so.*")))
    return link.parent


def write_config(config):
    """A header with what `build_info` tells; written where it changed, since ops.cpp follows it."""
    lines = [
        f"#define WUS_{name.upper()} {json.dumps(value)}" for name, value in config.items() if value
    ]
    header = ROOT / "build" / "generated" / "build_config.h"
    header.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join([*lines, ""])
    if not header.exists() or header.read_text() != text:
        header.write_text(text)


def extension():
    cuda, without = find_cuda()
    if cuda is not None:
        os.environ["CUDA_HOME"] = str(cuda)  # read when torch.utils.cpp_extension is imported
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS)
    # It warns of machines without a GPU, which can build all the same.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    compiled, linked = INSTRUMENTS[INSTRUMENT]
    flags = {"cxx": [*CXX_FLAGS, *compiled, *linked]}
    options = {}
    config = {"without_cuda": without}
    if cuda is not None:
        config = {"cuda": torch.version.cuda, "cuda_archs": os.environ["TORCH_CUDA_ARCH_LIST"]}
        flags["nvcc"] = ["-O3", "-std=c++20", "-lineinfo"]
        options["library_dirs"] = [str(cudart_directory(cuda))]
    csrc = Path("csrc")
    sources = {*csrc.rglob("*.cpp"), *csrc.rglob("*.cu")}
    if cuda is None:
        sources -= set(csrc.glob("cuda/**/*"))
    # Those that take longest come first, so that no core waits for them in the end.
    sources = sorted(map(str, sources), key=lambda path: ("simd" not in path, path))
    headers = sorted(str(path) for end in ("h", "inl", "cuh") for path in csrc.rglob(f"*.{end}"))
    build = CppExtension if cuda is None else CUDAExtension
    module = build(
        "wus_ext._C",
        sources,
        depends=headers,
        include_dirs=[str(ROOT / "csrc"), str(ROOT / "build" / "generated")],
        extra_compile_args=flags,
        extra_link_args=linked,
        **options,
    )

    class Build(BuildExtension):
        """Says what it does, and keeps its objects where pip would build in a folder it deletes."""

        def run(self):
            if self.editable_mode or self.inplace:
                self.build_temp = str(ROOT / "build" / f"inplace-{sys.implementation.cache_tag}")
            write_config(config)
            announce(sources, len(config.get("cuda_archs", "").replace(";", " ").split()))
            super().run()

    return [module], {"build_ext": Build}


def announce(sources, archs):
    """How many files there are to compile, and how long that takes where none is compiled yet."""
    jobs = os.environ.get("MAX_JOBS")
    cores = len(os.sched_getaffinity(0))
    cores = min(cores, int(jobs)) if jobs else cores
    seconds = CPU_SECONDS + CUDA_SECONDS * archs * sum(path.endswith(".cu") for path in sources)
    minutes = math.ceil(seconds / cores / 60)
    print(
        f"wus_ext: {len(sources)} files to compile, some {seconds} s of processor time: "
        f"about {minutes} min on {cores} core{'s' * (cores > 1)}, or less where some are compiled",
        flush=True,
    )
    os.environ.setdefault("NINJA_STATUS", "[%f/%t, %e s] ")


if __name__ == "__main__":
    modules, commands = extension()
    # What is compiled is good for the torch that it was compiled against, and no other.
    needs = [f"torch=={torch.__version__.split('+')[0]}"]
    setuptools.setup(ext_modules=modules, cmdclass=commands, install_requires=needs)
