// The maximum of each window of a 2x2 max-pool of stride 2 over NHWC pixels.
#pragma once

#include "common/layout.h"
#include "cpu/simd/simd_rows.h"

namespace wus::cpu::WUS_ISA {

// The window's maximum and its code: the first of equals, and the last NaN, as torch has it.
// value(pixel, c, lanes) is the pooled quantity.
template <class Value>
WUS_INLINE Vec window_max(const Window& window, int64_t c, int lanes, Value value, IVec* code) {
  Vec best = value(window.origin, c, lanes);
  IVec where = IVec{};
  const int64_t pixels[3] = {window.origin + 1, window.origin + window.width,
                             window.origin + window.width + 1};
  for (int k = 0; k < 3; ++k) {
    const Vec x = value(pixels[k], c, lanes);
    const IVec take = (x > best) | (x != x);
    best = select(take, x, best);
    where = take ? (k + 1) - IVec{} : where;
  }
  *code = where;
  return best;
}

template <class Value>
WUS_INLINE void max_pool(int64_t height, int64_t width, int64_t channels, bool relu, int64_t begin,
                         int64_t end, Value value, float* output, uint8_t* code) {
  Window window(height, width, begin);
  for (int64_t r = begin; r < end; ++r, window.next()) {
    for_channels(channels, [=](int64_t c, int lanes) WUS_INLINE_LAMBDA {
      IVec where;
      Vec y = window_max(window, c, lanes, value, &where);
      if (relu) {
        const IVec keep = relu_mask(y);
        y = select(keep, y, zero());
        where = keep ? where : kNothingPositive - IVec{};
      }
      store(output + r * channels + c, y, lanes);
      store_bytes(code + r * channels + c, where, lanes);
    });
  }
}

}  // namespace wus::cpu::WUS_ISA
