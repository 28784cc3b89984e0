#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#define WUS_ISA avx512
#define WUS_AVX2
#define WUS_AVX512

#include "cpu/simd/kernels.inl"

#endif
