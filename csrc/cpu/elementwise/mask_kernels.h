// Dropout with one bit an element, and what backward does with those bits.
// Every kernel is serial and takes dense rows [rows, channels] of elements T and masks
// [rows, ceil(channels / 8)].
#pragma once

#include <stdint.h>

#include "cpu/simd/dispatch.h"
#include "cpu/simd/element.h"

namespace wus::cpu {

template <class T>
struct MaskKernels {
  // output = input * scale where noise is 1, input * 0 where it is 0; with relu, of relu(input).
  void (*dropout)(const T* input, const T* noise, float scale, bool relu, T* output, uint8_t* mask,
                  int64_t rows, int64_t channels);
  // output = grad * scale where the mask is set, 0 elsewhere.
  void (*apply)(const T* grad, const uint8_t* mask, float scale, T* output, int64_t rows,
                int64_t channels);
};

WUS_DECLARE_TABLES(MaskKernels, mask_kernels)

}  // namespace wus::cpu
