// The kernels and launchers of csrc/cuda on the emulated GPU, as operators wus_emulated::* that
// take tensors on the CPU. One translation unit: torch's headers cost more than all the rest.
#include <ATen/ATen.h>
#include <torch/library.h>

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(ns, key, m) _TORCH_LIBRARY_IMPL(wus_emulated, CPU, m, C10_UID)
#define is_cuda is_cpu

#include "cuda/batch_norm/batch_norm.cpp"
#include "cuda/batch_norm/kernels.cu"
#include "cuda/elementwise/dropout.cpp"
#include "cuda/elementwise/dropout_kernels.cu"
#include "cuda/elementwise/mask.cpp"
#include "cuda/elementwise/mask_kernels.cu"
#include "cuda/elementwise/pool.cpp"
#include "cuda/elementwise/pool_kernels.cu"
