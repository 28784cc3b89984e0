#define WUS_ISA generic

#include "kernels.inl"
