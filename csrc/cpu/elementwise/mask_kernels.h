// Dropout with one bit an element, and what backward does with those bits.
// Every kernel is serial and takes dense float rows [rows, channels] and masks
// [rows, ceil(channels / 8)].
#pragma once

#include <stdint.h>

#include "cpu/simd/dispatch.h"

namespace wus::cpu {

struct MaskKernels {
  // output = input * scale where noise is 1, input * 0 where it is 0; with relu, of relu(input).
  void (*dropout)(const float* input, const float* noise, float scale, bool relu, float* output,
                  uint8_t* mask, int64_t rows, int64_t channels);
  // output = grad * scale where the mask is set, 0 elsewhere.
  void (*apply)(const float* grad, const uint8_t* mask, float scale, float* output, int64_t rows,
                int64_t channels);
};

WUS_DECLARE_TABLE(MaskKernels, mask_kernels)

}  // namespace wus::cpu
