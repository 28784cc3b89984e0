#include "cpu/depthwise/kernels.h"
#include "cpu/simd/simd_rows.h"

namespace wus::cpu::WUS_ISA {
namespace depthwise {

// Pixels whose sums are made at a time: enough that none waits for its own last product.
constexpr int kMostPixels = kRegisters == 32 ? 8 : 4;

// Calls body with a constant number of pixels for each piece of a row, pieces nearly equal.
template <int kPixels, class Body>
WUS_INLINE void piece(int64_t first, int64_t pixels, const Body& body) {
  if constexpr (kPixels > 0) {
    if (pixels == kPixels) {
      body.template operator()<kPixels>(first);
    } else {
      piece<kPixels - 1>(first, pixels, body);
    }
  }
}

template <class Body>
WUS_INLINE void for_pieces(int64_t width, const Body& body) {
  const int64_t pieces = (width + kMostPixels - 1) / kMostPixels;
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t first = i * width / pieces, last = (i + 1) * width / pieces;
    piece<kMostPixels>(first, last - first, body);
  }
}

template <int kCount>
WUS_INLINE void load_pixels(Vec (&to)[kCount], const float* from, int64_t pixel, int lanes) {
#pragma GCC unroll 32
  for (int i = 0; i < kCount; ++i, from += pixel) to[i] = load(from, lanes);
}

template <int kKernel, int kStride>
void forward(const DepthwiseRows& rows, const DepthwiseTaps& taps, const float* bias,
             int64_t channels, int64_t width, float* output) {
  const DepthwiseRows in = rows;
  const DepthwiseTaps w = taps;
  for_pieces(width, [&]<int kPixels>(int64_t first) WUS_INLINE_LAMBDA {
    constexpr int kSpan = (kPixels - 1) * kStride + kKernel;
    for_channels(channels, [=](int64_t c, int lanes) WUS_INLINE_LAMBDA {
      Vec sum[kPixels];
#pragma GCC unroll 8
      for (int p = 0; p < kPixels; ++p) sum[p] = bias ? load(bias + c, lanes) : zero();
#pragma GCC unroll 1
      for (int dy = 0; dy < kKernel; ++dy) {
        if (!in.row[dy]) continue;
        const float* row = in.row[dy] + first * kStride * in.pixel + c;
        const float* taps_of_row = w.data + dy * kKernel * w.stride + c;
        Vec x[kSpan];
        load_pixels(x, row, in.pixel, lanes);
#pragma GCC unroll 8
        for (int dx = 0; dx < kKernel; ++dx, taps_of_row += w.stride) {
          const Vec tap = load(taps_of_row, lanes);
#pragma GCC unroll 8
          for (int p = 0; p < kPixels; ++p) sum[p] = x[p * kStride + dx] * tap + sum[p];
        }
      }
      float* to = output + first * channels + c;
#pragma GCC unroll 8
      for (int p = 0; p < kPixels; ++p, to += channels) store(to, sum[p], lanes);
    });
  });
}

template <int kKernel, int kStride>
void dgrad(const DepthwiseRows& rows, const DepthwiseTaps& taps, int phase, int64_t padding,
           int64_t channels, int64_t width, float* output) {
  const DepthwiseRows in = rows;
  const DepthwiseTaps w = taps;
  // Pixel i of the output is column i + padding = kStride * q + its phase.
  constexpr int kReach = (kKernel - 1) / kStride;
  const int64_t start = padding / kStride, end = (width - 1 + padding) / kStride + 1;
  for_pieces(end - start, [&]<int kPixels>(int64_t first) WUS_INLINE_LAMBDA {
    const int64_t q = start + first, column = q * kStride - padding;
    const int64_t from = column < 0 ? -column : 0;
    const int64_t until = width - column < kPixels * kStride ? width - column : kPixels * kStride;
    for_channels(channels, [=](int64_t c, int lanes) WUS_INLINE_LAMBDA {
      Vec sum[kPixels * kStride] = {};
#pragma GCC unroll 1
      for (int j = 0; phase + j * kStride < kKernel; ++j) {
        if (!in.row[j]) continue;
        const float* row = in.row[j] + q * in.pixel + c;
        const float* tap_row = w.data + (phase + j * kStride) * kKernel * w.stride + c;
        Vec g[kPixels + kReach];
        load_pixels(g, row, in.pixel, lanes);
#pragma GCC unroll 8
        for (int dx = 0; dx < kKernel; ++dx, tap_row += w.stride) {
          const Vec tap = load(tap_row, lanes);
#pragma GCC unroll 8
          for (int p = 0; p < kPixels; ++p) {
            Vec& to = sum[p * kStride + dx % kStride];
            to = g[p + kReach - dx / kStride] * tap + to;
          }
        }
      }
#pragma GCC unroll 16
      for (int i = 0; i < kPixels * kStride; ++i) {
        if (i >= from && i < until) store(output + (column + i) * channels + c, sum[i], lanes);
      }
    });
  });
}

template <int kKernel, int kStride>
void wgrad(const DepthwiseRows& rows, const float* grad, int64_t channels, int64_t width,
           float* sums, int64_t sums_stride) {
  const DepthwiseRows in = rows;
  for_pieces(width, [&]<int kPixels>(int64_t first) WUS_INLINE_LAMBDA {
    constexpr int kSpan = (kPixels - 1) * kStride + kKernel;
    for_channels(channels, [=](int64_t c, int lanes) WUS_INLINE_LAMBDA {
      Vec g[kPixels];
      load_pixels(g, grad + first * in.pixel + c, in.pixel, lanes);
#pragma GCC unroll 1
      for (int dy = 0; dy < kKernel; ++dy) {
        if (!in.row[dy]) continue;
        const float* row = in.row[dy] + first * kStride * in.pixel + c;
        float* to = sums + dy * kKernel * sums_stride + c;
        Vec x[kSpan];
        load_pixels(x, row, in.pixel, lanes);
#pragma GCC unroll 8
        for (int dx = 0; dx < kKernel; ++dx, to += sums_stride) {
          Vec sum = load(to, lanes);
#pragma GCC unroll 8
          for (int p = 0; p < kPixels; ++p) sum = g[p] * x[p * kStride + dx] + sum;
          store(to, sum, lanes);
        }
      }
    });
  });
}

}  // namespace depthwise

#define WUS_DEPTHWISE(kernel, stride)                                    \
  {depthwise::forward<kernel, stride>, depthwise::dgrad<kernel, stride>, \
   depthwise::wgrad<kernel, stride>}

extern const DepthwiseTable depthwise_kernels = {
    {{WUS_DEPTHWISE(3, 1), WUS_DEPTHWISE(3, 2)}, {WUS_DEPTHWISE(5, 1), WUS_DEPTHWISE(5, 2)}}};

#undef WUS_DEPTHWISE

}  // namespace wus::cpu::WUS_ISA
