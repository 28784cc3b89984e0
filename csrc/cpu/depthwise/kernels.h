// Depthwise convolution, 3x3 or 5x5 with stride 1 or 2, one row at a time. Channels are dense, the
// pixels of a row `pixel` floats apart; rows are handed over by pointers, null for one outside the
// map, and have room for the padding beside the map, which holds zeros.
#pragma once

#include <stdint.h>

#include "cpu/simd/dispatch.h"

namespace wus::cpu {

constexpr int kDepthwiseMostTaps = 5;  // in one dimension

// The weight [kernel * kernel][channels], taps `stride` floats apart.
struct DepthwiseTaps {
  const float* data;
  int64_t stride;
};

struct DepthwiseRows {
  const float* row[kDepthwiseMostTaps];
  int64_t pixel;
};

struct DepthwiseKernels {
  // output[i] = bias + the sum of rows[dy][i * stride + dx] * taps[dy][dx] for 0 <= i < width.
  // Null bias: none.
  void (*forward)(const DepthwiseRows& rows, const DepthwiseTaps& taps, const float* bias,
                  int64_t channels, int64_t width, float* output);
  // The pixels i of one row of the data gradient whose tap row is dy = phase, phase + stride, ...
  // for the gradient's row rows[0], rows[1], ...: output[i] = the sum of rows[j][(i + padding - dx)
  // / stride] * taps[dy][dx] over the dx that divide, 0 <= i < width. The rows begin
  // (kernel - 1) / stride pixels before the map.
  void (*dgrad)(const DepthwiseRows& rows, const DepthwiseTaps& taps, int phase, int64_t padding,
                int64_t channels, int64_t width, float* output);
  // sums[dy][dx] += the sum of grad[i] * rows[dy][i * stride + dx] for 0 <= i < width; `grad` and
  // `sums` are laid out as rows and taps are.
  void (*wgrad)(const DepthwiseRows& rows, const float* grad, int64_t channels, int64_t width,
                float* sums, int64_t sums_stride);
};

// By kernel (3, 5) and stride (1, 2).
struct DepthwiseTable {
  DepthwiseKernels by[2][2];
};

WUS_DECLARE_TABLE(DepthwiseTable, depthwise_kernels)

}  // namespace wus::cpu
