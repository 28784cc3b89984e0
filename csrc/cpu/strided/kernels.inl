#include "cpu/strided/kernels.h"
#include "cpu/winograd/kernels.inl"

namespace wus::cpu::WUS_ISA {

// F(4, 2) at the points 0, 1, -1, 2 and infinity: y[i] = g0 d[i] + g1 d[i + 1].
struct TwoTaps {
  static WUS_INLINE void input(const Vec* d, Vec* v) {
    const Vec outer = d[3] - d[1];
    v[0] = 2.f * (d[0] - d[2]) + outer;
    v[1] = 2.f * d[1] + (d[2] - d[3]);
    v[2] = 3.f * d[2] - (2.f * d[1] + d[3]);
    v[3] = outer;
    v[4] = (d[4] - d[2]) - 2.f * outer;
  }
  static WUS_INLINE void output(const Vec* m, Vec* y) {
    const Vec sum = m[1] + m[2], difference = m[1] - m[2];
    y[0] = (m[0] + m[3]) + sum;
    y[1] = 2.f * m[3] + difference;
    y[2] = 4.f * m[3] + sum;
    y[3] = 8.f * m[3] + (difference + m[4]);
  }
  static WUS_INLINE void weight(Vec g0, Vec g1, Vec* u) {
    u[0] = 0.5f * g0;
    u[1] = 0.5f * (g0 + g1);
    u[2] = (g0 - g1) * (1.f / 6);
    u[3] = g0 * (1.f / 6) + g1 * (1.f / 3);
    u[4] = g1;
  }
};

struct StridedForward {
  static constexpr int kTile = 4, kPatch = 9, kPoints = 9;
  static constexpr int kStep = 8, kBefore = 1;  // from tile to tile and before the first, pixels
  static constexpr bool kLocal = false;
  static constexpr int kWitnesses[] = {2, 6};
  static constexpr bool sees(int output, int input) {
    return input >= 2 * output && input < 2 * output + 3;
  }
  static constexpr bool watches(int) { return true; }
  static WUS_INLINE void input(const Vec* d, Vec* v) {
    const Vec odd[5] = {d[0], d[2], d[4], d[6], d[8]};
    TwoTaps::input(odd, v);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) v[5 + i] = d[2 * i + 1];
  }
  static WUS_INLINE void output(const Vec* m, Vec* y) {
    TwoTaps::output(m, y);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) y[i] += m[5 + i];
  }
};

struct StridedDgrad {
  static constexpr int kTile = 8, kPatch = 5, kPoints = 9;
  static constexpr int kStep = 4, kBefore = 0;
  static constexpr bool kLocal = false;
  static constexpr int kWitnesses[] = {0, 1, 2, 3};
  static constexpr bool sees(int output, int input) {
    return input == output / 2 || input == (output + 1) / 2;
  }
  static constexpr bool watches(int output) { return output != 3 && output != 5; }
  static WUS_INLINE void input(const Vec* d, Vec* v) {
    TwoTaps::input(d, v);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) v[5 + i] = d[i];
  }
  static WUS_INLINE void output(const Vec* m, Vec* y) {
    Vec odd[4];
    TwoTaps::output(m, odd);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      y[2 * i] = m[5 + i];
      y[2 * i + 1] = odd[i];
    }
  }
};

// For the data gradient the taps come mirrored.
struct StridedWeight {
  static constexpr int kPoints = kStridedWeights;
  static WUS_INLINE void weight(const Vec* g, Vec* u) {
    TwoTaps::weight(g[0], g[2], u);
    u[5] = g[1];
  }
};

template <class Scheme>
static void strided_input(const WinogradInput& in, int64_t first, int64_t last,
                          const WinogradTiles& v) {
  const int64_t whole = in.channels / kWidth * kWidth;
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t col = tile % in.tile_cols, rest = tile / in.tile_cols;
    const int64_t row = rest % in.tile_rows, image = rest / in.tile_rows;
    Pixel pixels[Scheme::kPatch * Scheme::kPatch];
    find_pixels<Scheme, WinogradSource::plain>(in, image, row * Scheme::kStep - Scheme::kBefore,
                                               col * Scheme::kStep - Scheme::kBefore, pixels);
    v.empty[tile - first] = find_empty<Scheme, WinogradSource::plain>(in, pixels);
    float* to = v.data + (tile - first) * v.row;
    int64_t channel = 0;
    for (; channel < whole; channel += kWidth) {
      input_block<Scheme, WinogradSource::plain, true>(in, pixels, Owned{}, channel, kWidth,
                                                       to + channel, v.plane, nullptr);
    }
    if (channel < in.channels) {
      input_block<Scheme, WinogradSource::plain, false>(in, pixels, Owned{}, channel,
                                                        (int)(in.channels - channel), to + channel,
                                                        v.plane, nullptr);
    }
  }
}

template <class Scheme>
static bool strided_output(const WinogradOutput& out, int64_t first, int64_t last,
                           const WinogradTiles& m, int64_t channels) {
  const int64_t whole = channels / kWidth * kWidth;
  IVec wild{};
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t col = tile % out.tile_cols, rest = tile / out.tile_cols;
    const int64_t row = rest % out.tile_rows, image = rest / out.tile_rows;
    const TilePlace place{image, row * Scheme::kTile, col * Scheme::kTile};
    const float* from = m.data + (tile - first) * m.row;
    const uint64_t empty = m.empty[tile - first];
    int64_t channel = 0;
    for (; channel < whole; channel += kWidth) {
      output_block<Scheme, WinogradEpilogue::none, true>(out, place, channel, kWidth, from, m.plane,
                                                         nullptr, false, empty, wild);
    }
    if (channel < channels) {
      output_block<Scheme, WinogradEpilogue::none, false>(out, place, channel,
                                                          (int)(channels - channel), from, m.plane,
                                                          nullptr, false, empty, wild);
    }
  }
  return to_bits(wild) == 0;
}

extern const StridedKernels strided_kernels = {
    {strided_input<StridedForward>, strided_input<StridedDgrad>},
    {strided_output<StridedForward>, strided_output<StridedDgrad>},
    transform_weight<StridedWeight>,
};

}  // namespace wus::cpu::WUS_ISA
