// Every vector kernel; compiled once per instruction set.
#include "../simd.h"

#include "../batch_norm_kernels.inl"
#include "../gemm_kernels.inl"
#include "../mask_kernels.inl"
#include "../pool_kernels.inl"
#include "../strided_kernels.inl"
#include "../winograd_kernels.inl"
