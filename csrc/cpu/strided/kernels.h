// 3x3 convolution with stride 2 and padding 1 by polyphase minimal filtering.
//
// In one dimension, y[i] = (w0 o[i-1] + w2 o[i]) + w1 e[i] with the even and odd pixels e and o: a
// filter of two taps, of which F(4, 2) makes 4 outputs with 5 products, and one of one tap, 4
// products. The data gradient likewise: e[i] = w1 g[i] and o[i] = w2 g[i] + w0 g[i+1]. In two
// dimensions a tile of 4x4 outputs costs 81 products instead of 144, and as all products of the
// single tap share their weight, only 36 of the 81 weights differ.
#pragma once

#include "cpu/winograd/kernels.h"

namespace wus::cpu {

constexpr int kStridedPoints = 9;   // products in one dimension: five of F(4, 2), four of one tap
constexpr int kStridedWeights = 6;  // that differ
constexpr int kStridedTile = 4;     // outputs of the convolution in one dimension

// The weight of a product.
inline int strided_weight(int product) {
  const int row = product / kStridedPoints, col = product % kStridedPoints;
  return (row < 5 ? row : 5) * kStridedWeights + (col < 5 ? col : 5);
}

// Tiles, maps and planes as in winograd_kernels.h; forward and data gradient differ.
struct StridedKernels {
  void (*input[2])(const WinogradInput& in, int64_t first, int64_t last, const WinogradTiles& v);
  // The first `channels` channels of the output. Returns whether they can be trusted.
  bool (*output[2])(const WinogradOutput& out, int64_t first, int64_t last, const WinogradTiles& m,
                    int64_t channels);
  void (*weight)(const WinogradWeight& weight, int64_t columns, int64_t first, int64_t last,
                 float* packed, int64_t plane);
};

WUS_DECLARE_TABLE(StridedKernels, strided_kernels)

}  // namespace wus::cpu
