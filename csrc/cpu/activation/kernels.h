// Activations over dense rows [rows, channels] of elements T, with what stands in front of them:
// scale and shift of each channel, a residual. Serial; rows [begin, end) of a map are read where
// they lie, and what is written goes to rows of its own, so that a block of a map may be written
// into a cache.
#pragma once

#include <stdint.h>

#include "common/activation.h"
#include "cpu/simd/dispatch.h"
#include "cpu/simd/element.h"

namespace wus::cpu {

// act(scale * x + shift + residual)
template <class T>
struct Activated {
  const T* x;
  const float *scale, *shift;  // [channels], both or neither
  const T* residual;           // or null
  int64_t channels;
  int act;
  float slope;
};

// The gradient g that passes an activation.
template <class T>
struct ActivationGrad {
  const T* grad;        // of the output
  const uint8_t* mask;  // bits; null where the slope follows from scale * x + shift
  const T* x;
  const float *scale, *shift;  // both or neither
  int64_t channels;
  int act;
  float slope;
};

// What a normalisation makes of it: a * g + b * x + c.
struct NormCoefficients {
  const float *a, *b, *c;  // [channels]
};

// Where rows are written: the first at `data`, the next `stride` elements further.
template <class T>
struct RowsOut {
  T* data;
  int64_t stride;
};

template <class T>
struct ActivationKernels {
  // mask: rows of bits, or null where none are wanted or needed.
  void (*forward)(const Activated<T>& op, int64_t begin, int64_t end, RowsOut<T> output,
                  uint8_t* mask);
  // output: g, or with coefficients what the normalisation makes of it; gated: rows for g, or null.
  void (*backward)(const ActivationGrad<T>& op, const NormCoefficients* coefficients, int64_t begin,
                   int64_t end, RowsOut<T> output, T* gated);
  // sums[c] += g, and unless mean is null sums[channels + c] += g * (x - mean); gated as above.
  void (*grad_sums)(const ActivationGrad<T>& op, const float* mean, int64_t begin, int64_t end,
                    double* sums, T* gated);
  // The same between a map of T and floats in a cache.
  void (*forward_from_floats)(const Activated<float>& op, int64_t begin, int64_t end,
                              RowsOut<T> output, uint8_t* mask);
  void (*backward_to_floats)(const ActivationGrad<T>& op, const NormCoefficients* coefficients,
                             int64_t begin, int64_t end, RowsOut<float> output, float* gated);
};

WUS_DECLARE_TABLES(ActivationKernels, activation_kernels)

}  // namespace wus::cpu
