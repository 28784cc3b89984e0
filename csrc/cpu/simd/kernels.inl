// Every vector kernel; compiled once per instruction set.
#include "cpu/simd/simd.h"

#include "cpu/activation/kernels.inl"
#include "cpu/batch_norm/kernels.inl"
#include "cpu/depthwise/kernels.inl"
#include "cpu/elementwise/mask_kernels.inl"
#include "cpu/gate/kernels.inl"
#include "cpu/gemm/kernels.inl"
#include "cpu/pool/kernels.inl"
#include "cpu/strided/kernels.inl"
#include "cpu/winograd/kernels.inl"
