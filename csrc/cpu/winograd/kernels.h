// 3x3 convolution with unit stride by Winograd's minimal filtering, in three steps over tiles of
// the output: transform the input patches, multiply frequency by frequency (gemm_kernels.h),
// transform back. The weight gradient is the adjoint: transform patches and gradients, multiply
// over the tiles, transform back. These are the serial steps; winograd_schedule.cpp and
// winograd_wgrad.cpp schedule them.
#pragma once

#include <stdint.h>

#include "cpu/simd/dispatch.h"

namespace wus::cpu {

// F(m x m, 3x3), and the 9-multiplication product for maps of at most 2x2 pixels with padding 1.
enum class WinogradScheme { z2, f2, f4 };
constexpr int kWinogradSchemes = 3;

// What a pixel of the transformed map is, computed as it is loaded.
enum class WinogradSource {
  plain,     // x
  bits,      // x where the mask bit is set
  codes,     // x[y / 2, x / 2] where its pool code names this pixel
  bn,        // a * x + b * z + c
  bn_bits,   // a * (x where the bit is set) + b * z + c
  bn_codes,  // a * (x[y / 2, x / 2] where its code names this pixel) + b * z + c
};
constexpr int kWinogradSources = 6;

enum class WinogradEpilogue {
  none,
  relu,   // with a bit mask of what is not <= 0
  pool,   // relu, then 2x2 max-pooling, with a code for each pooled element
  stats,  // with sums for the mean and the variance of each channel
};
constexpr int kWinogradEpilogues = 4;

// Maps are channels_last and dense: [images][height][width][channels].
struct WinogradInput {
  const float* x;
  const uint8_t* mask;  // bits [pixel][ceil(channels / 8)] or codes [pooled pixel][channels]
  const float* z;
  const float *a, *b, *c;  // [channels]
  int64_t height, width, channels;
  int64_t padding;
  int64_t tile_rows, tile_cols;  // tiles of one image
};

struct WinogradOutput {
  float* y;
  uint8_t* mask;
  const float* bias;                // [channels] or null
  int64_t height, width, channels;  // of the convolution's output, before pooling
  int64_t tile_rows, tile_cols;
};

// Where the transformed tiles lie: element [frequency * plane + tile * row + channel / p * panel +
// channel % p] for a p of GemmKernels::panel channels; with panel = p a row is in one piece.
struct WinogradTiles {
  float* data;
  int64_t row, plane, panel;
  // [tiles] or null: a bit for each of a tile's outputs that sees nothing but zeros, of schemes
  // whose products would not make it exactly zero.
  uint64_t* empty;
};

struct WinogradWeight {
  const float* data;  // [outputs][inputs][3][3], with strides in floats
  int64_t output, input, y, x;
};

// The gradient of a weight, likewise.
struct WinogradGradient {
  float* data;
  int64_t output, input, y, x;
};

struct WinogradKernels {
  // Transforms tiles [first, last) into tiles 0, 1, ... of v. `sums` is null or [channels]: gains
  // the sum of the pixels whose tiles these are.
  void (*input[kWinogradSchemes][kWinogradSources])(const WinogradInput&, int64_t first,
                                                    int64_t last, const WinogradTiles& v,
                                                    float* sums);
  // As `input`, of tiles of one pixel, which stays what it is.
  void (*pixels[kWinogradSources])(const WinogradInput&, int64_t first, int64_t last,
                                   const WinogradTiles& v, float* sums);
  // `stats`: [3][channels], set to a pivot, and the sums of z - pivot and (z - pivot)^2. Returns
  // whether the outputs can be trusted: not where NaN, infinity or a huge number may have spread
  // over a tile.
  bool (*output[kWinogradSchemes][kWinogradEpilogues])(const WinogradOutput&, int64_t first,
                                                       int64_t last, const WinogradTiles& m,
                                                       float* stats);
  // Input channels [first, last) of one panel, of which `columns` output channels exist;
  // packed[frequency * plane + input * panel + column].
  void (*weight[kWinogradSchemes])(const WinogradWeight&, int64_t columns, int64_t first,
                                   int64_t last, float* packed, int64_t plane);
  // As `input`, for the tiles of a gradient that a weight gradient is made from; no sums.
  void (*grad[kWinogradSchemes][kWinogradSources])(const WinogradInput&, int64_t first,
                                                   int64_t last, const WinogradTiles& v,
                                                   float* sums);
  // The weight gradient of `outputs` x `inputs` channels, at most a panel of each, from
  // blocks[frequency][output][input] of whole panels. Returns whether they can be trusted.
  bool (*wgrad[kWinogradSchemes])(const float* blocks, const WinogradGradient&, int64_t outputs,
                                  int64_t inputs);
};

WUS_DECLARE_TABLE(WinogradKernels, winograd_kernels)

}  // namespace wus::cpu
