// ReLU and dropout with one bit an element, and what backward does with those bits.
// Every kernel is serial and takes dense float rows [rows, channels] and masks
// [rows, ceil(channels / 8)].
#pragma once

#include <stdint.h>

#include "cpu/simd/dispatch.h"

namespace wus::cpu {

struct MaskKernels {
  // output = relu(input), in place where they are the same.
  void (*relu)(const float* input, float* output, uint8_t* mask, int64_t rows, int64_t channels);
  // output = relu(input + other).
  void (*add_relu)(const float* input, const float* other, float* output, uint8_t* mask,
                   int64_t rows, int64_t channels);
  // output = input * scale where noise is 1, input * 0 where it is 0; with relu, of relu(input).
  void (*dropout)(const float* input, const float* noise, float scale, bool relu, float* output,
                  uint8_t* mask, int64_t rows, int64_t channels);
  // output = grad * scale where the mask is set, 0 elsewhere.
  void (*apply)(const float* grad, const uint8_t* mask, float scale, float* output, int64_t rows,
                int64_t channels);
  // sums[c] += the masked gradient, which is stored unless grad_input is null. No mask: all of it,
  // and nothing is stored.
  void (*bias_grad)(const float* grad, const uint8_t* mask, float* grad_input, double* sums,
                    int64_t rows, int64_t channels);
};

WUS_DECLARE_TABLE(MaskKernels, mask_kernels)

}  // namespace wus::cpu
