"""A build with CUDA has every kernel registered; this needs the build, not a GPU."""

import pytest
import torch

import wus_ext

KERNELS = [
    "convolution",
    "linear",
    "activate",
    "activate_",
    "apply_mask",
    "activate_grad",
    "relu_max_pool",
    "max_pool_bias_grad",
    "batch_norm_stats",
    "batch_norm_scale_shift",
    "batch_norm_train",
    "batch_norm_apply",
    "batch_norm_grad_coefficients",
    "batch_norm_grad_input",
    "dropout_mask",
    "relu_dropout_mask",
]

needs_cuda_build = pytest.mark.skipif(
    wus_ext.build_info()["cuda"] is None, reason="wus_ext was built without CUDA"
)


@needs_cuda_build
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_is_registered(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"wus::{name}", "CUDA")


@needs_cuda_build
def test_build_info_names_the_toolkit_and_the_architectures():
    info = wus_ext.build_info()
    assert info["cuda"] == torch.version.cuda
    assert info["cuda_archs"]
