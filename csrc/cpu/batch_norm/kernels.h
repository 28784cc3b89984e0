// Training-mode batch norm over dense rows [rows, channels], with the ReLU or the ReLU and 2x2
// max-pool that follows it. Serial; begin and end count output rows, so that a thread may take any
// range.
#pragma once

#include <stdint.h>

#include "common/activation.h"
#include "cpu/simd/dispatch.h"

namespace wus::cpu {

struct BatchNorm {
  const float* x;
  const float* scale;
  const float* shift;
  const float* residual;  // added before the activation; may be null
  int64_t height, width;  // of x, for kReluMaxPool
  int64_t channels;
  int act;
};

struct BatchNormGrad {
  const float* grad;  // of the output
  const float* x;
  const uint8_t* mask;  // or codes, as act says
  const float* scale;   // scale and shift for kReluRecompute
  const float* shift;
  int64_t height, width;
  int64_t channels;
  int act;
};

struct BatchNormKernels {
  // moments[c] += sum of x, moments[channels + c] += sum of x * x: in double throughout, which
  // loses nothing until the mean is some 1e6 times the deviation.
  void (*moments)(const float* x, int64_t rows, int64_t channels, double* moments);
  // output = act(scale * x + shift + residual).
  void (*apply)(const BatchNorm& op, int64_t begin, int64_t end, float* output, uint8_t* mask);
  // With g the gradient that passes the activation: sums[c] += sum of g,
  // sums[channels + c] += sum of g * (x - mean).
  void (*grad_sums)(const BatchNormGrad& op, const float* mean, int64_t begin, int64_t end,
                    double* sums);
  // grad_input = a * g + b * x + c0; grad_residual = g unless it is null.
  void (*grad_input)(const BatchNormGrad& op, const float* a, const float* b, const float* c0,
                     int64_t begin, int64_t end, float* grad_input, float* grad_residual);
};

WUS_DECLARE_TABLE(BatchNormKernels, batch_norm_kernels)

}  // namespace wus::cpu
