// Training-mode batch norm over dense rows [rows, channels] of elements T: its statistics, and what
// differs where a max-pool follows it (the rest is in cpu/activation/kernels.h). Serial; begin and
// end count output rows, those of the input in pool_grad_input, so that a thread may take any
// range.
#pragma once

#include <stdint.h>

#include "cpu/activation/kernels.h"
#include "cpu/pool/shape.h"

namespace wus::cpu {

template <class T>
struct PooledNorm {
  PoolShape shape;
  const T* x;
  const float *scale, *shift;  // [channels]
  int64_t channels;
  bool relu;
};

template <class T>
struct PooledNormGrad {
  PoolShape shape;
  const T* grad;  // of the output
  const T* x;
  const uint8_t* code;
  int64_t channels;
};

template <class T>
struct BatchNormKernels {
  // moments[c] += sum of x, moments[channels + c] += sum of x * x: in double throughout, which
  // loses nothing until the mean is some 1e6 times the deviation.
  void (*moments)(const T* x, int64_t rows, int64_t channels, double* moments);
  // output = max_pool(act(scale * x + shift)).
  void (*pool)(const PooledNorm<T>& op, int64_t begin, int64_t end, T* output, uint8_t* code);
  // With g the gradient that passes pool and activation: sums[c] += sum of g,
  // sums[channels + c] += sum of g * (x - mean).
  void (*pool_grad_sums)(const PooledNormGrad<T>& op, const float* mean, int64_t begin, int64_t end,
                         double* sums);
  // grad_input = a * g + b * x + c.
  void (*pool_grad_input)(const PooledNormGrad<T>& op, const NormCoefficients& coefficients,
                          int64_t begin, int64_t end, T* grad_input);
};

WUS_DECLARE_TABLES(BatchNormKernels, batch_norm_kernels)

}  // namespace wus::cpu
