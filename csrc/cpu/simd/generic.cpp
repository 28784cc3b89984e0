#define WUS_ISA generic

#include "cpu/simd/kernels.inl"
