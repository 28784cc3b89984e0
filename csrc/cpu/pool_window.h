// Walks the windows of a 2x2 max-pool of stride 2 over NHWC pixels.
#pragma once

#include "simd_rows.h"

namespace wus::cpu::WUS_ISA {

constexpr int kNothingPositive = 4;  // the code of a window through which no gradient passes

struct Window {
  int64_t height, width;  // of the input
  int64_t oh, ow;         // of the output pixel
  int64_t origin;         // input pixel of the window's first element

  WUS_INLINE Window(int64_t height, int64_t width, int64_t output_pixel)
      : height(height), width(width) {
    const int64_t line = output_pixel / (width / 2);
    ow = output_pixel % (width / 2);
    oh = line % (height / 2);
    origin = (line / (height / 2) * height + 2 * oh) * width + 2 * ow;
  }

  WUS_INLINE void next() {
    origin += 2;
    if (++ow < width / 2) return;
    ow = 0;
    origin += width % 2 + width;
    if (++oh < height / 2) return;
    oh = 0;
    origin += height % 2 * width;
  }

  // Lines and columns of input that belong to this window: the last windows of an odd extent also
  // answer for the rim that no window covers.
  WUS_INLINE int lines() const { return height % 2 && oh == height / 2 - 1 ? 3 : 2; }
  WUS_INLINE int columns() const { return width % 2 && ow == width / 2 - 1 ? 3 : 2; }

  // body(input pixel, code of that position): a rim pixel's code is one that no window has.
  template <class Body>
  WUS_INLINE void for_pixels(Body body) const {
    body(origin, 0);
    body(origin + 1, 1);
    body(origin + width, 2);
    body(origin + width + 1, 3);
    if (columns() == 3) {
      body(origin + 2, kRim);
      body(origin + width + 2, kRim);
    }
    if (lines() == 3) {
      for (int dx = 0; dx < columns(); ++dx) body(origin + 2 * width + dx, kRim);
    }
  }

  static constexpr int kRim = 255;
};

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
