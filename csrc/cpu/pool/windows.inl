// Walks over the windows of a max-pool and over the pixels below them, NHWC.
#pragma once

#include "cpu/pool/shape.h"
#include "cpu/simd/simd_rows.h"

namespace wus::cpu::WUS_ISA {

// The window of an output pixel.
struct PoolWindow {
  PoolShape shape;
  int64_t image, oh, ow;

  WUS_INLINE PoolWindow(const PoolShape& shape, int64_t output_pixel) : shape(shape) {
    const int64_t line = quotient(output_pixel, shape.ow);
    image = quotient(line, shape.oh);
    oh = line - image * shape.oh;
    ow = output_pixel - line * shape.ow;
  }

  WUS_INLINE void next() {
    if (++ow < shape.ow) return;
    ow = 0;
    if (++oh < shape.oh) return;
    oh = 0;
    ++image;
  }

  // Of the window's first element, be it inside the map or not.
  WUS_INLINE int64_t top() const { return oh * shape.stride - shape.padding; }
  WUS_INLINE int64_t left() const { return ow * shape.stride - shape.padding; }
  WUS_INLINE int64_t origin() const {
    return (image * shape.height + top()) * shape.width + left();
  }
};

// The part of a window, or of the windows over a pixel, that lies inside: [first, last).
struct Extent {
  int64_t first, last;
};

WUS_INLINE Extent inside(int64_t start, int64_t kernel, int64_t size) {
  return {start < 0 ? -start : 0, start + kernel > size ? size - start : kernel};
}

// The windows in one dimension that hold a pixel.
WUS_INLINE Extent windows_over(int64_t pixel, const PoolShape& shape, int64_t windows) {
  const int64_t at = pixel + shape.padding, last = quotient(at, shape.stride) + 1;
  const int64_t first =
      at < shape.kernel ? 0 : quotient(at - shape.kernel + shape.stride, shape.stride);
  return {first, last < windows ? last : windows};
}

// body(dy, dx) for each pixel of a window inside the map, in order.
template <int kKernel, class Body>
WUS_INLINE void for_window(const Extent& rows, const Extent& cols, Body body) {
  if (kKernel > 0 && rows.last - rows.first == kKernel && cols.last - cols.first == kKernel) {
#pragma GCC unroll 3
    for (int dy = 0; dy < kKernel; ++dy) {
#pragma GCC unroll 3
      for (int dx = 0; dx < kKernel; ++dx) body(dy, dx);
    }
    return;
  }
  for (int64_t dy = rows.first; dy < rows.last; ++dy) {
    for (int64_t dx = cols.first; dx < cols.last; ++dx) body(dy, dx);
  }
}

// Output pixels [begin, end). The first of equals wins, and the last NaN, as torch has it.
// value(pixel, c, lanes) is the pooled quantity.
template <int kKernel, class Value, class T>
WUS_INLINE void max_pool_windows(const PoolShape& shape, int64_t channels, bool relu, int64_t begin,
                                 int64_t end, Value value, T* output, uint8_t* code) {
  PoolWindow window(shape, begin);
  for (int64_t r = begin; r < end; ++r, window.next()) {
    const Extent rows = inside(window.top(), shape.kernel, shape.height);
    const Extent cols = inside(window.left(), shape.kernel, shape.width);
    const int32_t start = (int32_t)(rows.first * shape.kernel + cols.first);
    const int64_t origin = window.origin();
    for_channels(channels, [=](int64_t c, int lanes) WUS_INLINE_LAMBDA {
      Vec best = broadcast(-__builtin_inff());
      IVec where = start - IVec{};
      for_window<kKernel>(rows, cols, [&](int64_t dy, int64_t dx) WUS_INLINE_LAMBDA {
        const Vec x = value(origin + dy * shape.width + dx, c, lanes);
        const IVec take = (x > best) | (x != x);
        best = select(take, x, best);
        where = take ? (int32_t)(dy * shape.kernel + dx) - IVec{} : where;
      });
      if (relu) {
        const IVec keep = relu_mask(best);
        best = select(keep, best, zero());
        where = keep ? where : shape.blocked() - IVec{};
      }
      store(output + r * channels + c, best, lanes);
      store_bytes(code + r * channels + c, where, lanes);
    });
  }
}

template <class Value, class T>
WUS_INLINE void max_pool(const PoolShape& shape, int64_t channels, bool relu, int64_t begin,
                         int64_t end, Value value, T* output, uint8_t* code) {
  switch (shape.kernel) {
    case 2:
      return max_pool_windows<2>(shape, channels, relu, begin, end, value, output, code);
    case 3:
      return max_pool_windows<3>(shape, channels, relu, begin, end, value, output, code);
    default:
      return max_pool_windows<0>(shape, channels, relu, begin, end, value, output, code);
  }
}

// Input pixels [begin, end): put(pixel, c, lanes, the gradient that reaches it).
template <class Put, class T>
WUS_INLINE void unpool_pixels(const PoolShape& shape, int64_t channels, const T* grad,
                              const uint8_t* code, int64_t begin, int64_t end, Put put) {
  const int64_t line = quotient(begin, shape.width);
  int64_t image = quotient(line, shape.height);
  int64_t y = line - image * shape.height, x = begin - line * shape.width;
  Extent rows = windows_over(y, shape, shape.oh);
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const Extent cols = windows_over(x, shape, shape.ow);
    for_channels(channels, [=](int64_t c, int lanes) WUS_INLINE_LAMBDA {
      Vec sum = zero();
      for (int64_t oh = rows.first; oh < rows.last; ++oh) {
        const int64_t dy = y + shape.padding - oh * shape.stride;
        for (int64_t ow = cols.first; ow < cols.last; ++ow) {
          const int64_t i = ((image * shape.oh + oh) * shape.ow + ow) * channels + c;
          const int64_t dx = x + shape.padding - ow * shape.stride;
          const IVec here = load_bytes(code + i, lanes) == (int32_t)(dy * shape.kernel + dx);
          sum += select(here, load(grad + i, lanes), zero());
        }
      }
      put(pixel, c, lanes, sum);
    });
    if (++x < shape.width) continue;
    x = 0;
    if (++y == shape.height) {
      y = 0;
      ++image;
    }
    rows = windows_over(y, shape, shape.oh);
  }
}

}  // namespace wus::cpu::WUS_ISA
