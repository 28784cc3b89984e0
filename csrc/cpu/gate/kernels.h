// Backward of maps multiplied by a gate: one number a channel of each image.
#pragma once

#include <stdint.h>

#include "cpu/simd/dispatch.h"
#include "cpu/simd/element.h"

namespace wus::cpu {

// Serial, of dense rows [rows, channels] of one image.
template <class T>
struct GateKernels {
  // grad_input = grad * gate where there is a gate; sums[c] += grad * input where there is an
  // input.
  void (*backward)(const T* grad, const T* input, const T* gate, int64_t rows, int64_t channels,
                   T* grad_input, double* sums);
};

WUS_DECLARE_TABLES(GateKernels, gate_kernels)

}  // namespace wus::cpu
