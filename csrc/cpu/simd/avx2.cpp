#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define WUS_ISA avx2
#define WUS_AVX2

#include "cpu/simd/kernels.inl"

#endif
