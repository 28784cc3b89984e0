"""Builds wus_ext._C: the CPU part everywhere, the CUDA part where torch and the machine allow it.

FORCE_CUDA=1 makes a missing CUDA toolkit an error; FORCE_CPU=1 leaves the CUDA part out.
TORCH_CUDA_ARCH_LIST chooses the GPU architectures (default: 8.0 9.0 10.0+PTX).
WUS_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer (see `make sanitize`).
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

try:
    import torch
except ImportError:
    sys.exit(
        "wus_ext is built against the installed torch, and none was found: "
        "pip install torch, then pip install --no-build-isolation ."
    )

ROOT = Path(__file__).parent.resolve()
DEFAULT_ARCHS = "8.0 9.0 10.0+PTX"
OLDEST_CUDNN_FRONTEND = (1, 32)
CUDNN_SOURCES = ("conv_epilogue.cpp", "dgrad_graph.cpp")
CXX_FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
CXX_FLAGS += [
    "-Wno-unknown-pragmas",
    "-fvisibility=hidden",
    "-Wno-maybe-uninitialized",  # g++ 12 takes its own AVX-512 headers for suspects
]
SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
if os.environ.get("WUS_SANITIZE") == "1":
    CXX_FLAGS += SANITIZERS


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
    """The toolkit to build with, or None for a CPU-only build; says which and why."""
    if os.environ.get("FORCE_CPU") == "1":
        return None
    if torch.version.cuda is None:
        problems = ["this torch has no CUDA"]
    else:
        problems = []
        for home in dict.fromkeys(toolkits()):
            problem = why_unusable(home)
            if problem is None:
                passed_over = f" (not {'; '.join(problems)})" if problems else ""
                print(f"wus_ext: building for CPU and CUDA with {home}{passed_over}")
                return home
            problems.append(f"{home}: {problem}")
    reason = "; ".join(problems)
    if os.environ.get("FORCE_CUDA") == "1":
        version = torch.version.cuda
        hint = (
            f'; try: pip install "cuda-toolkit[nvcc,cccl,cudart]=={version}.*"' if version else ""
        )
        sys.exit(f"wus_ext: FORCE_CUDA=1, but no usable CUDA toolkit was found ({reason}){hint}")
    print(f"wus_ext: building for CPU only ({reason})")
    return None


def cudnn_frontend(home):
    """Include folders for cuDNN's graphs and cudnn-frontend's version; None without the headers."""
    packages = [Path(sysconfig.get_paths()["purelib"]), Path(torch.__file__).parents[1]]
    cudnn = [home / "include", *(folder / "nvidia" / "cudnn" / "include" for folder in packages)]
    frontend = [home / "include", *(folder / "include" for folder in packages)]
    folders = []
    for header, places in (("cudnn.h", cudnn), ("cudnn_frontend_version.h", frontend)):
        folder = next((place for place in places if (place / header).exists()), None)
        if folder is None:
            print(f"wus_ext: without cuDNN's graphs (no {header})")
            return None
        folders.append(str(folder))
    text = Path(folders[1], "cudnn_frontend_version.h").read_text()
    version = tuple(map(int, re.findall(r"define CUDNN_FRONTEND_[A-Z]+_VERSION (\d+)", text)))
    shown = ".".join(map(str, version))
    if version < OLDEST_CUDNN_FRONTEND:
        wanted = ".".join(map(str, OLDEST_CUDNN_FRONTEND))
        print(f"wus_ext: without cuDNN's graphs (cudnn-frontend {shown}, {wanted} is needed)")
        return None
    return folders, shown


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


def extension():
    cuda = find_cuda()
    if cuda is not None:
        os.environ["CUDA_HOME"] = str(cuda)  # read when torch.utils.cpp_extension is imported
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS)
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    patterns = ["ops.cpp", "autograd/*.cpp", "deferral/*.cpp", "cpu/**/*.cpp"]
    flags = {"cxx": list(CXX_FLAGS)}
    options = {}
    graphs = None
    if cuda is not None:
        patterns += ["cuda/**/*.cpp", "cuda/**/*.cu"]
        archs = os.environ["TORCH_CUDA_ARCH_LIST"]
        flags["cxx"] += [
            "-DWUS_WITH_CUDA",
            f'-DWUS_CUDA_VERSION="{torch.version.cuda}"',
            f'-DWUS_CUDA_ARCHS="{archs}"',
        ]
        graphs = cudnn_frontend(cuda)
        if graphs is not None:
            folders, version = graphs
            flags["cxx"].append(f'-DWUS_CUDNN_FRONTEND="{version}"')
            flags["cxx"] += [part for folder in folders for part in ("-isystem", folder)]
        flags["nvcc"] = ["-O3", "-std=c++20", "-lineinfo"]
        options["library_dirs"] = [str(cudart_directory(cuda))]
    csrc = Path("csrc")
    sources = {path for pattern in patterns for path in csrc.glob(pattern)}
    if graphs is None:
        sources = {path for path in sources if path.name not in CUDNN_SOURCES}
    sources = sorted(map(str, sources))
    headers = sorted(str(path) for end in ("h", "inl", "cuh") for path in csrc.rglob(f"*.{end}"))
    build = CppExtension if cuda is None else CUDAExtension
    module = build(
        "wus_ext._C",
        sources,
        depends=headers,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=flags,
        extra_link_args=["-fopenmp", *(flag for flag in CXX_FLAGS if "sanitize" in flag)],
        **options,
    )
    return [module], {"build_ext": BuildExtension}


if __name__ == "__main__":
    modules, commands = extension()
    setup(ext_modules=modules, cmdclass=commands)
