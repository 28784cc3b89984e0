#pragma once

#include "cpu/winograd/kernels.h"
#include "cpu/winograd/schemes.inl"
#include "cpu/winograd/zeros.inl"

namespace wus::cpu::WUS_ISA {

// Which rows and columns of the patch, [first, last), are summed with this tile and no other.
struct Owned {
  int first_row, last_row, first_col, last_col;
};

template <class Scheme, WinogradSource kSource, bool kFull>
WUS_INLINE void input_block(const WinogradInput& in, const Pixel* pixels, const Owned& owned,
                            int64_t channel, int n, float* to, int64_t plane, float* sums) {
  constexpr int kPatch = Scheme::kPatch, kPoints = Scheme::kPoints;
  const ChannelVectors vectors = load_vectors<kSource, kFull>(in, channel, n);
  Vec half[kPoints][kPatch];
  Vec sum = zero();
#pragma GCC unroll 9
  for (int j = 0; j < kPatch; ++j) {
    Vec column[kPatch], transformed[kPoints];
#pragma GCC unroll 9
    for (int i = 0; i < kPatch; ++i) {
      column[i] = load_pixel<kSource, kFull>(in, pixels[i * kPatch + j], vectors, channel, n);
    }
    if (j >= owned.first_col && j < owned.last_col) {
#pragma GCC unroll 9
      for (int i = 0; i < kPatch; ++i) {
        if (i >= owned.first_row && i < owned.last_row) sum += column[i];
      }
    }
    Scheme::input(column, transformed);
#pragma GCC unroll 9
    for (int i = 0; i < kPoints; ++i) half[i][j] = transformed[i];
  }
  if (sums != nullptr) {
    store_block<kFull>(sums + channel, load_block<kFull>(sums + channel, n) + sum, n);
  }
#pragma GCC unroll 9
  for (int i = 0; i < kPoints; ++i) {
    Vec transformed[kPoints];
    Scheme::input(half[i], transformed);
#pragma GCC unroll 9
    for (int j = 0; j < kPoints; ++j) {
      store(to + (i * kPoints + j) * plane, transformed[j]);
    }
  }
}

template <class Scheme, WinogradSource kSource>
static void input_tiles(const WinogradInput& in, int64_t first, int64_t last,
                        const WinogradTiles& v, float* sums) {
  const int64_t whole = in.channels / kWidth * kWidth;
  // The patch starts this far before the outputs; the 2x2 scheme takes its padding as understood.
  const int before = Scheme::kPatch > Scheme::kTile ? (int)in.padding : 0;
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t col = tile % in.tile_cols, rest = tile / in.tile_cols;
    const int64_t tile_row = rest % in.tile_rows, image = rest / in.tile_rows;
    Pixel pixels[Scheme::kPatch * Scheme::kPatch];
    find_pixels<Scheme, kSource>(in, image, tile_row * Scheme::kTile - before,
                                 col * Scheme::kTile - before, pixels);
    Owned owned{};
    if (sums != nullptr) {
      // The pixels under the tile's own outputs; the last tile also takes what remains.
      owned = {before, tile_row + 1 == in.tile_rows ? Scheme::kPatch : before + Scheme::kTile,
               before, col + 1 == in.tile_cols ? Scheme::kPatch : before + Scheme::kTile};
    }
    if constexpr (!Scheme::kLocal) {
      if (v.empty != nullptr) v.empty[tile - first] = find_empty<Scheme, kSource>(in, pixels);
    }
    float* row = v.data + (tile - first) * v.row;
    const auto to = [&](int64_t channel) {
      return row + channel / kPanel * v.panel + channel % kPanel;
    };
    int64_t channel = 0;
    for (; channel < whole; channel += kWidth) {
      input_block<Scheme, kSource, true>(in, pixels, owned, channel, kWidth, to(channel), v.plane,
                                         sums);
    }
    if (channel < in.channels) {
      input_block<Scheme, kSource, false>(in, pixels, owned, channel, (int)(in.channels - channel),
                                          to(channel), v.plane, sums);
    }
  }
}

// The greater of two, the later NaN winning, as max_pool2d scans; `code` follows.
WUS_INLINE void take_greater(Vec candidate, int32_t position, Vec& best, IVec& code) {
  const IVec wins = (candidate > best) | (candidate != candidate);
  best = select(wins, candidate, best);
  code = wins ? position - IVec{} : code;
}

template <bool kFull>
WUS_INLINE void pool_pixel(Vec a, Vec b, Vec c, Vec d, float* y, uint8_t* codes, int n) {
  Vec best = a;
  IVec code{};
  take_greater(b, 1, best, code);
  take_greater(c, 2, best, code);
  take_greater(d, 3, best, code);
  const IVec kept = relu_mask(best);
  code = kept ? code : 4 - IVec{};
  store_block<kFull>(y, select(kept, best, zero()), n);
  kFull ? store_bytes(codes, code) : store_bytes_first(codes, code, n);
}

// Where something is not finite, or so large that its rounding error would drown what it spreads
// over.
WUS_INLINE IVec is_wild(Vec x) { return ~(absolute(x) <= 0x1p64f); }

struct TilePlace {
  int64_t image, row, col;  // of its first output
};

template <class Scheme, WinogradEpilogue kEpilogue, bool kFull>
WUS_INLINE void output_block(const WinogradOutput& out, const TilePlace& place, int64_t channel,
                             int n, const float* m, int64_t plane, float* stats, bool first,
                             uint64_t empty, IVec& wild) {
  constexpr int kTile = Scheme::kTile, kPoints = Scheme::kPoints;
  Vec half[kTile][kPoints];
#pragma GCC unroll 9
  for (int j = 0; j < kPoints; ++j) {
    Vec column[kPoints], transformed[kTile];
#pragma GCC unroll 9
    for (int i = 0; i < kPoints; ++i) column[i] = load(m + (i * kPoints + j) * plane + channel);
    Scheme::output(column, transformed);
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) half[i][j] = transformed[i];
  }
  const Vec bias = out.bias ? load_block<kFull>(out.bias + channel, n) : zero();
  Vec y[kTile][kTile];
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i) Scheme::output(half[i], y[i]);
  Vec watched = zero();
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kTile; ++j) {
      if (Scheme::watches(i) && Scheme::watches(j)) watched += y[i][j];
    }
  }
  wild |= is_wild(watched);
  if (!Scheme::kLocal && __builtin_expect(empty != 0, 0)) {
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kTile; ++j) {
        if (empty >> (i * kTile + j) & 1) y[i][j] = zero();
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kTile; ++j) y[i][j] += bias;
  }

  if constexpr (kEpilogue == WinogradEpilogue::pool) {
    const int64_t height = out.height / 2, width = out.width / 2;
#pragma GCC unroll 2
    for (int i = 0; i < kTile; i += 2) {
      const int64_t row = place.row / 2 + i / 2;
#pragma GCC unroll 2
      for (int j = 0; j < kTile; j += 2) {
        const int64_t col = place.col / 2 + j / 2;
        if (row >= height || col >= width) continue;
        const int64_t at = ((place.image * height + row) * width + col) * out.channels + channel;
        pool_pixel<kFull>(y[i][j], y[i][j + 1], y[i + 1][j], y[i + 1][j + 1], out.y + at,
                          out.mask + at, n);
      }
    }
    return;
  }

  Vec pivot, sum, squares;
  if constexpr (kEpilogue == WinogradEpilogue::stats) {
    pivot = first ? y[0][0] : load_block<kFull>(stats + channel, n);
    sum = first ? zero() : load_block<kFull>(stats + out.channels + channel, n);
    squares = first ? zero() : load_block<kFull>(stats + 2 * out.channels + channel, n);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kTile; ++j) {
      const int64_t row = place.row + i, col = place.col + j;
      if (row >= out.height || col >= out.width) continue;
      const int64_t pixel = (place.image * out.height + row) * out.width + col;
      Vec value = y[i][j];
      if constexpr (kEpilogue == WinogradEpilogue::relu) {
        const IVec kept = relu_mask(value);
        value = select(kept, value, zero());
        uint8_t* bits = out.mask + pixel * ((out.channels + 7) / 8) + channel / 8;
        kFull ? store_bits(bits, to_bits(kept)) : store_bits_first(bits, to_bits(kept), n);
      }
      if constexpr (kEpilogue == WinogradEpilogue::stats) {
        const Vec shifted = value - pivot;
        sum += shifted;
        squares = shifted * shifted + squares;
      }
      store_block<kFull>(out.y + pixel * out.channels + channel, value, n);
    }
  }
  if constexpr (kEpilogue == WinogradEpilogue::stats) {
    store_block<kFull>(stats + channel, pivot, n);
    store_block<kFull>(stats + out.channels + channel, sum, n);
    store_block<kFull>(stats + 2 * out.channels + channel, squares, n);
  }
}

template <class Scheme, WinogradEpilogue kEpilogue>
static bool output_tiles(const WinogradOutput& out, int64_t first, int64_t last,
                         const WinogradTiles& m, float* stats) {
  const int64_t whole = out.channels / kWidth * kWidth;
  IVec wild{};
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t col = tile % out.tile_cols, rest = tile / out.tile_cols;
    const int64_t row = rest % out.tile_rows, image = rest / out.tile_rows;
    const TilePlace place{image, row * Scheme::kTile, col * Scheme::kTile};
    const float* from = m.data + (tile - first) * m.row;
    const uint64_t empty = Scheme::kLocal ? 0 : m.empty[tile - first];
    int64_t channel = 0;
    for (; channel < whole; channel += kWidth) {
      output_block<Scheme, kEpilogue, true>(out, place, channel, kWidth, from, m.plane, stats,
                                            tile == first, empty, wild);
    }
    if (channel < out.channels) {
      output_block<Scheme, kEpilogue, false>(out, place, channel, (int)(out.channels - channel),
                                             from, m.plane, stats, tile == first, empty, wild);
    }
  }
  return to_bits(wild) == 0;
}

// The taps of `depth` input channels and a panel of output channels, of which `columns` exist.
static void load_taps(const WinogradWeight& w, const float* from, int depth, int64_t columns,
                      float (*taps)[9][kPanel]) {
  if (w.output == 1 && columns == kPanel) {
    for (int k = 0; k < depth; ++k) {
      for (int tap = 0; tap < 9; ++tap) {
        const float* at = from + k * w.input + tap / 3 * w.y + tap % 3 * w.x;
        store(taps[k][tap], load(at));
        store(taps[k][tap] + kWidth, load(at + kWidth));
      }
    }
    return;
  }
  for (int column = 0; column < kPanel; ++column, from += w.output) {
    for (int k = 0; k < depth; ++k) {
      for (int tap = 0; tap < 9; ++tap) {
        taps[k][tap][column] =
            column < columns ? from[k * w.input + tap / 3 * w.y + tap % 3 * w.x] : 0.f;
      }
    }
  }
}

constexpr int64_t kCachedWeight = int64_t{4} << 20;  // floats

template <class Scheme>
static void transform_weight(const WinogradWeight& w, int64_t columns, int64_t first, int64_t last,
                             float* packed, int64_t plane) {
  constexpr int kPoints = Scheme::kPoints, kDepth = 8;
  // Of several input channels at a time, which are neighbours in a dense weight.
  float taps[kDepth][9][kPanel];
  // What no cache holds until it is used need not be read into one to be overwritten.
  const bool past_caches = kPoints * kPoints * plane > kCachedWeight &&
                           reinterpret_cast<uintptr_t>(packed) % sizeof(Vec) == 0 &&
                           plane % kWidth == 0;
  for (int64_t k0 = first; k0 < last; k0 += kDepth) {
    const int depth = last - k0 < kDepth ? (int)(last - k0) : kDepth;
    load_taps(w, w.data + k0 * w.input, depth, columns, taps);
    for (int k = 0; k < depth; ++k) {
      for (int side = 0; side < 2; ++side) {
        Vec half[kPoints][3];
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) {
          Vec column[3], transformed[kPoints];
#pragma GCC unroll 3
          for (int i = 0; i < 3; ++i) column[i] = load(taps[k][i * 3 + j] + side * kWidth);
          Scheme::weight(column, transformed);
#pragma GCC unroll 9
          for (int i = 0; i < kPoints; ++i) half[i][j] = transformed[i];
        }
        float* to = packed + (k0 + k) * kPanel + side * kWidth;
#pragma GCC unroll 9
        for (int i = 0; i < kPoints; ++i) {
          Vec transformed[kPoints];
          Scheme::weight(half[i], transformed);
#pragma GCC unroll 9
          for (int j = 0; j < kPoints; ++j) {
            float* place = to + (i * kPoints + j) * plane;
            past_caches ? stream(place, transformed[j]) : store(place, transformed[j]);
          }
        }
      }
    }
  }
  end_streams();
}

template <class Scheme>
static bool weight_gradient(const float* blocks, const WinogradGradient& w, int64_t outputs,
                            int64_t inputs) {
  constexpr int kPoints = Scheme::kPoints;
  IVec wild{};
  for (int64_t output = 0; output < outputs; ++output) {
    for (int64_t input = 0; input < inputs; input += kWidth) {
      const float* from = blocks + output * kPanel + input;
      const int n = inputs - input < kWidth ? (int)(inputs - input) : kWidth;
      Vec half[3][kPoints];
#pragma GCC unroll 9
      for (int j = 0; j < kPoints; ++j) {
        Vec column[kPoints], transformed[3];
#pragma GCC unroll 9
        for (int i = 0; i < kPoints; ++i) {
          column[i] = load(from + (i * kPoints + j) * kPanel * kPanel);
        }
        Scheme::weight_adjoint(column, transformed);
        for (int i = 0; i < 3; ++i) half[i][j] = transformed[i];
      }
      float* to = w.data + output * w.output + input * w.input;
      for (int i = 0; i < 3; ++i) {
        Vec taps[3];
        Scheme::weight_adjoint(half[i], taps);
        for (int j = 0; j < 3; ++j) {
          wild |= is_wild(taps[j]);
          float* tap = to + i * w.y + j * w.x;
          if (w.input == 1) {
            n == kWidth ? store(tap, taps[j]) : store_first(tap, taps[j], n);
          } else {
            for (int k = 0; k < n; ++k) tap[k * w.input] = taps[j][k];
          }
        }
      }
    }
  }
  return to_bits(wild) == 0;
}

#define WUS_INPUTS(scheme)                                                                  \
  {input_tiles<scheme, WinogradSource::plain>,   input_tiles<scheme, WinogradSource::bits>, \
   input_tiles<scheme, WinogradSource::codes>,   input_tiles<scheme, WinogradSource::bn>,   \
   input_tiles<scheme, WinogradSource::bn_bits>, input_tiles<scheme, WinogradSource::bn_codes>}
#define WUS_OUTPUTS(scheme)                                                                    \
  {output_tiles<scheme, WinogradEpilogue::none>, output_tiles<scheme, WinogradEpilogue::relu>, \
   output_tiles<scheme, WinogradEpilogue::pool>, output_tiles<scheme, WinogradEpilogue::stats>}

extern const WinogradKernels winograd_kernels = {
    {WUS_INPUTS(Z2), WUS_INPUTS(F2), WUS_INPUTS(F4)},
    WUS_INPUTS(Pixelwise),
    {WUS_OUTPUTS(Z2), WUS_OUTPUTS(F2), WUS_OUTPUTS(F4)},
    {transform_weight<Z2>, transform_weight<F2>, transform_weight<F4>},
    {WUS_INPUTS(Z2Grad), WUS_INPUTS(F2Grad), WUS_INPUTS(F4Grad)},
    {weight_gradient<Z2>, weight_gradient<F2>, weight_gradient<F4>},
};

#undef WUS_INPUTS
#undef WUS_OUTPUTS

}  // namespace wus::cpu::WUS_ISA
