// Which outputs of a tile see nothing but zeros, where a transform would leave rounding errors.
#pragma once

#include "cpu/winograd/sources.inl"

namespace wus::cpu::WUS_ISA {

template <WinogradSource kSource, bool kFull>
WUS_INLINE bool block_is_zero(const WinogradInput& in, const Pixel& pixel, int64_t channel, int n) {
  const ChannelVectors vectors = load_vectors<kSource, kFull>(in, channel, n);
  return to_bits(load_pixel<kSource, kFull>(in, pixel, vectors, channel, n) != zero()) == 0;
}

// Whether a pixel is zero in every channel.
template <WinogradSource kSource>
static bool is_zero(const WinogradInput& in, const Pixel& pixel) {
  int64_t channel = 0;
  for (; channel + kWidth <= in.channels; channel += kWidth) {
    if (!block_is_zero<kSource, true>(in, pixel, channel, kWidth)) return false;
  }
  return channel == in.channels ||
         block_is_zero<kSource, false>(in, pixel, channel, (int)(in.channels - channel));
}

template <class Scheme, WinogradSource kSource>
static uint64_t mark_empty(const WinogradInput& in, const Pixel* pixels) {
  constexpr int kPatch = Scheme::kPatch, kTile = Scheme::kTile;
  bool zeros[kPatch * kPatch];
  for (int i = 0; i < kPatch * kPatch; ++i) zeros[i] = is_zero<kSource>(in, pixels[i]);
  uint64_t empty = 0;
  for (int output = 0; output < kTile * kTile; ++output) {
    bool all = true;
    for (int i = 0; i < kPatch * kPatch; ++i) {
      all &= zeros[i] || !Scheme::sees(output / kTile, i / kPatch) ||
             !Scheme::sees(output % kTile, i % kPatch);
    }
    empty |= (uint64_t)all << output;
  }
  return empty;
}

// Marks the outputs of a tile that see nothing but zeros. Few pixels tell that there is none.
template <class Scheme, WinogradSource kSource>
WUS_INLINE uint64_t find_empty(const WinogradInput& in, const Pixel* pixels) {
  for (int row : Scheme::kWitnesses) {
    for (int col : Scheme::kWitnesses) {
      Pixel witness = pixels[row * Scheme::kPatch + col];
      witness.inside = -1;  // where it is not, the pixel inside that stands for it is seen as well
      if (is_zero<kSource>(in, witness)) return mark_empty<Scheme, kSource>(in, pixels);
    }
  }
  return 0;
}

}  // namespace wus::cpu::WUS_ISA
