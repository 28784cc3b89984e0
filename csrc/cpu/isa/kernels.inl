// Every vector kernel; compiled once per instruction set.
#include "../simd.h"

#include "../gemm_kernels.inl"
#include "../winograd_kernels.inl"
