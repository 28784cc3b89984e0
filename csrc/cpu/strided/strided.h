// Convolution with a stride, float32, maps channels_last, on a weight packed beforehand: 3x3 with
// stride 2 and padding 1 (strided_polyphase.cpp), 1x1 with any stride (strided_pointwise.cpp).
// Schemas, shapes and layouts: see ops.cpp.
#pragma once

#include <stdint.h>

#include "cpu/winograd/kernels.h"

namespace wus::cpu {

// Maps are dense and channels_last; tile counts are left to the callee. `y` is written whole.
// Return whether the outputs can be trusted; if not, strided.cpp makes them directly.
bool polyphase_forward(WinogradInput in, WinogradOutput out, int64_t images, const float* packed);
bool polyphase_dgrad(WinogradInput in, WinogradOutput out, int64_t images, const float* packed);
void polyphase_pack(const WinogradWeight& weight, int64_t inputs, int64_t outputs, float* packed);

struct PixelStride {
  int64_t y, x;
};

void pointwise_forward(const WinogradInput& in, const WinogradOutput& out, int64_t images,
                       PixelStride stride, const float* packed);
void pointwise_dgrad(const WinogradInput& in, const WinogradOutput& out, int64_t images,
                     PixelStride stride, const float* packed);
void pointwise_pack(const WinogradWeight& weight, int64_t inputs, int64_t outputs, float* packed);

}  // namespace wus::cpu
