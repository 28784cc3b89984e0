// Where things lie in memory, for the kernels of the CPU and of the GPU alike: dense rows of
// channels (NHWC), masks with bit c % 8 of byte c / 8 in each row, pooling codes with a byte an
// output element.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define WUS_LAYOUT_INLINE __host__ __device__ __forceinline__
#define WUS_ANY_BODY _Pragma("nv_exec_check_disable")
#else
// Always inlined: a copy compiled for one instruction set must not serve another.
#define WUS_LAYOUT_INLINE inline __attribute__((always_inline))
#define WUS_ANY_BODY
#endif

namespace wus {

WUS_LAYOUT_INLINE int64_t mask_bytes(int64_t channels) { return (channels + 7) / 8; }

// A pooling code: 0 to 3 is the position 2 * dy + dx of the maximum.
constexpr int kNothingPositive = 4;  // the code of a window through which no gradient passes
constexpr int kRim = 255;            // the position of pixels outside every window

// a / b for numbers from 0 up: a GPU divides 64 bits several times slower than 32.
WUS_LAYOUT_INLINE int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// A window of a 2x2 max-pool of stride 2 over NHWC pixels. Height and width are at least 2.
struct Window {
  int64_t height, width;  // of the input
  int64_t oh, ow;         // of the output pixel
  int64_t origin;         // input pixel of the window's first element

  WUS_LAYOUT_INLINE Window(int64_t height, int64_t width, int64_t output_pixel)
      : height(height), width(width) {
    const int64_t line = quotient(output_pixel, width / 2);
    const int64_t image = quotient(line, height / 2);
    ow = output_pixel - line * (width / 2);
    oh = line - image * (height / 2);
    origin = (image * height + 2 * oh) * width + 2 * ow;
  }

  WUS_LAYOUT_INLINE void next() {
    origin += 2;
    if (++ow < width / 2) return;
    ow = 0;
    origin += width % 2 + width;
    if (++oh < height / 2) return;
    oh = 0;
    origin += height % 2 * width;
  }

  // The input pixel at a position of the window.
  WUS_LAYOUT_INLINE int64_t pixel(int position) const {
    return origin + position / 2 * width + position % 2;
  }

  // Lines and columns of input that belong to this window: the last windows of an odd extent also
  // answer for the rim that no window covers.
  WUS_LAYOUT_INLINE int lines() const { return height % 2 && oh == height / 2 - 1 ? 3 : 2; }
  WUS_LAYOUT_INLINE int columns() const { return width % 2 && ow == width / 2 - 1 ? 3 : 2; }

  // body(input pixel, position): over all windows each input pixel comes up once.
  WUS_ANY_BODY template <class Body>
  WUS_LAYOUT_INLINE void for_pixels(Body body) const {
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
};

}  // namespace wus
