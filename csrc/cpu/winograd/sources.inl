// The pixels that a tile is transformed from, computed as they are loaded.
#pragma once

#include "cpu/winograd/kernels.h"

namespace wus::cpu::WUS_ISA {

// A block is the kWidth channels (fewer in the last one, !kFull) that one vector holds.
template <bool kFull>
WUS_INLINE Vec load_block(const float* p, int n) {
  return kFull ? load(p) : load_first(p, n);
}

template <bool kFull>
WUS_INLINE void store_block(float* p, Vec v, int n) {
  kFull ? store(p, v) : store_first(p, v, n);
}

// A pixel of a patch. Outside the map it stands for a pixel inside, whose value is then dropped.
struct Pixel {
  int64_t x, z, bits;  // offsets of its first channel
  int32_t inside;      // 0 or -1
  int32_t code;        // that names it among the four of its pooled pixel, or -1
};

template <WinogradSource kSource>
constexpr bool kIsPooled = kSource == WinogradSource::codes || kSource == WinogradSource::bn_codes;
template <WinogradSource kSource>
constexpr bool kIsBatchNorm = kSource == WinogradSource::bn || kSource == WinogradSource::bn_bits ||
                              kSource == WinogradSource::bn_codes;

template <class Scheme, WinogradSource kSource>
WUS_INLINE void find_pixels(const WinogradInput& in, int64_t image, int64_t top, int64_t left,
                            Pixel* pixels) {
  const int64_t bytes = (in.channels + 7) / 8;
  const int64_t pooled_height = in.height / 2, pooled_width = in.width / 2;
  for (int i = 0; i < Scheme::kPatch; ++i) {
    for (int j = 0; j < Scheme::kPatch; ++j) {
      const int64_t row = top + i, col = left + j;
      const int64_t y = row < 0 ? 0 : row < in.height ? row : in.height - 1;
      const int64_t x = col < 0 ? 0 : col < in.width ? col : in.width - 1;
      const int64_t index = (image * in.height + y) * in.width + x;
      Pixel& pixel = pixels[i * Scheme::kPatch + j];
      pixel.inside = -(int32_t)(y == row && x == col);
      pixel.x = pixel.z = index * in.channels;
      pixel.bits = index * bytes;
      if constexpr (kIsPooled<kSource>) {
        const int64_t py = y / 2 < pooled_height ? y / 2 : pooled_height - 1;
        const int64_t px = x / 2 < pooled_width ? x / 2 : pooled_width - 1;
        pixel.x = ((image * pooled_height + py) * pooled_width + px) * in.channels;
        pixel.code = py == y / 2 && px == x / 2 ? (int32_t)(y % 2 * 2 + x % 2) : -1;
      }
    }
  }
}

struct ChannelVectors {
  Vec a, b, c;
};

template <WinogradSource kSource, bool kFull>
WUS_INLINE ChannelVectors load_vectors(const WinogradInput& in, int64_t channel, int n) {
  ChannelVectors v{};
  if constexpr (kIsBatchNorm<kSource>) {
    v.a = load_block<kFull>(in.a + channel, n);
    v.b = load_block<kFull>(in.b + channel, n);
    v.c = load_block<kFull>(in.c + channel, n);
  }
  return v;
}

template <WinogradSource kSource, bool kFull>
WUS_INLINE Vec load_pixel(const WinogradInput& in, const Pixel& pixel, const ChannelVectors& k,
                          int64_t channel, int n) {
  Vec x = load_block<kFull>(in.x + pixel.x + channel, n), z{};
  if constexpr (kIsBatchNorm<kSource>) z = load_block<kFull>(in.z + pixel.z + channel, n);
  if constexpr (kSource == WinogradSource::bits || kSource == WinogradSource::bn_bits) {
    const uint8_t* p = in.mask + pixel.bits + channel / 8;
    x = select(from_bits(kFull ? load_bits(p) : load_bits_first(p, n)), x, zero());
  }
  if constexpr (kIsPooled<kSource>) {
    const uint8_t* p = in.mask + pixel.x + channel;
    const IVec codes = kFull ? load_bytes(p) : load_bytes_first(p, n);
    x = select(codes == pixel.code, x, zero());
  }
  if constexpr (kIsBatchNorm<kSource>) x = k.a * x + (k.b * z + k.c);
  return (Vec)((IVec)x & pixel.inside);
}

}  // namespace wus::cpu::WUS_ISA
