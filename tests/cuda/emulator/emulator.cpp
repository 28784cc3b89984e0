// The kernels and launchers of csrc/cuda on the emulated GPU, as operators wus_emulated::* that
// take tensors on the CPU. One translation unit: torch's headers cost more than all the rest.
#include <ATen/ATen.h>
#include <torch/library.h>

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(ns, key, m) _TORCH_LIBRARY_IMPL(wus_emulated, CPU, m, C10_UID)
#define is_cuda is_cpu

#include "cuda/batch_norm.cpp"
#include "cuda/batch_norm_kernels.cu"
#include "cuda/dropout.cpp"
#include "cuda/dropout_kernels.cu"
#include "cuda/linear_epilogue.cpp"
#include "cuda/lt_matmul.cpp"
#include "cuda/mask.cpp"
#include "cuda/mask_kernels.cu"
#include "cuda/pool.cpp"
#include "cuda/pool_kernels.cu"
