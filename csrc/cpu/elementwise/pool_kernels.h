// 2x2 max-pool of stride 2, with or without ReLU, that keeps one byte a pooled element: 0 to 3 is
// the position 2 * dy + dx of the maximum, 4 says that it was not positive and passes no gradient.
// NHWC pixels; begin and end count output pixels (batch * (height / 2) * (width / 2) in all), so
// that a thread may take any range. height and width are at least 2.
#pragma once

#include <stdint.h>

#include "cpu/simd/dispatch.h"

namespace wus::cpu {

struct PoolKernels {
  void (*relu_max_pool)(const float* input, int64_t height, int64_t width, int64_t channels,
                        bool relu, int64_t begin, int64_t end, float* output, uint8_t* code);
  // Writes each input pixel of the windows, and of the rim beside them, once.
  void (*unpool)(const float* grad, const uint8_t* code, int64_t height, int64_t width,
                 int64_t channels, int64_t begin, int64_t end, float* grad_input);
  // sums[c] += the gradient that passes.
  void (*bias_grad)(const float* grad, const uint8_t* code, int64_t rows, int64_t channels,
                    double* sums);
};

WUS_DECLARE_TABLE(PoolKernels, pool_kernels)

}  // namespace wus::cpu
