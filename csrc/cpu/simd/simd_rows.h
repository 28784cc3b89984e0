// Loops over rows x channels: whole vectors, then the channels left over, for any channel count.
#pragma once

#include "common/layout.h"
#include "cpu/simd/simd.h"

namespace wus::cpu::WUS_ISA {

// Accesses of a given number of lanes. Inlined with the constant kWidth they are the plain ones.
template <class T>
WUS_INLINE Vec load(const T* p, int lanes) {
  return lanes == kWidth ? load(p) : load_first(p, lanes);
}

template <class T>
WUS_INLINE void store(T* p, Vec v, int lanes) {
  if (lanes == kWidth) {
    store(p, v);
  } else {
    store_first(p, v, lanes);
  }
}

WUS_INLINE uint32_t load_bits(const uint8_t* p, int lanes) {
  return lanes == kWidth ? load_bits(p) : load_bits_first(p, lanes);
}

// Bits beyond the last lane are stored as zero.
WUS_INLINE void store_bits(uint8_t* p, uint32_t bits, int lanes) {
  if (lanes == kWidth) {
    store_bits(p, bits);
  } else {
    store_bits_first(p, bits, lanes);
  }
}

WUS_INLINE IVec load_bytes(const uint8_t* p, int lanes) {
  return lanes == kWidth ? load_bytes(p) : load_bytes_first(p, lanes);
}

WUS_INLINE void store_bytes(uint8_t* p, IVec v, int lanes) {
  if (lanes == kWidth) {
    store_bytes(p, v);
  } else {
    store_bytes_first(p, v, lanes);
  }
}

WUS_INLINE void add_to(double* p, Vec v, int lanes) {
  float values[kWidth];
  store(values, v);
  for (int i = 0; i < lanes; ++i) p[i] += values[i];
}

// Doubles, half as many in a vector.
constexpr int kDoubleWidth = kWidth / 2;
typedef double DVec __attribute__((vector_size(8 * kDoubleWidth)));
typedef double UnalignedDVec __attribute__((vector_size(8 * kDoubleWidth), aligned(8), may_alias));
typedef float UnalignedHalfVec
    __attribute__((vector_size(4 * kDoubleWidth), aligned(4), may_alias));

WUS_INLINE DVec load_widened(const float* p) {
  return __builtin_convertvector(*reinterpret_cast<const UnalignedHalfVec*>(p), DVec);
}

WUS_INLINE DVec load_widened(const Bf16* p) {
  typedef uint16_t Quarter __attribute__((vector_size(2 * kDoubleWidth), aligned(2), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(4 * kDoubleWidth)));
  typedef float Floats __attribute__((vector_size(4 * kDoubleWidth)));
  const Bits bits = __builtin_convertvector(*reinterpret_cast<const Quarter*>(p), Bits) << 16;
  return __builtin_convertvector((Floats)bits, DVec);
}

WUS_INLINE double widened(const float* p) { return *p; }
WUS_INLINE double widened(const Bf16* p) {
  const uint32_t bits = (uint32_t)p->bits << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

WUS_INLINE void add_to(double* p, DVec v) { *reinterpret_cast<UnalignedDVec*>(p) += v; }

// body(c, lanes) for each vector of a row.
template <class Body>
WUS_INLINE void for_channels(int64_t channels, Body body) {
  int64_t c = 0;
  for (; c + kWidth <= channels; c += kWidth) body(c, kWidth);
  if (c < channels) body(c, (int)(channels - c));
}

// Lambdas too must be inlined, for the reason simd.h gives.
#define WUS_INLINE_LAMBDA __attribute__((always_inline))

// A float sum runs over at most this many rows before it is added to a double.
constexpr int64_t kChain = 64;

template <int Sums, int Vectors, class Term>
WUS_INLINE void sum_tile(int64_t rows, int64_t channels, int64_t c, int lanes, double* sums,
                         int64_t first, Term term) {
  Vec total[Vectors][Sums] = {};
  for (int64_t r = first; r < first + rows; ++r) {
    for (int v = 0; v < Vectors; ++v) term(r, c + v * kWidth, lanes, total[v]);
  }
  for (int v = 0; v < Vectors; ++v) {
    for (int s = 0; s < Sums; ++s) add_to(sums + s * channels + c + v * kWidth, total[v][s], lanes);
  }
}

// sums[s * channels + c] += the sum over rows of what term(row, c, lanes, Vec total[Sums]) adds to
// total[s]. The term is called once for each row and vector, so it may also store.
template <int Sums, class Term>
WUS_INLINE void sum_rows(int64_t rows, int64_t channels, double* sums, Term term) {
  constexpr int kVectors = 4;
  for (int64_t first = 0; first < rows; first += kChain) {
    const int64_t n = rows - first < kChain ? rows - first : kChain;
    int64_t c = 0;
    for (; c + kVectors * kWidth <= channels; c += kVectors * kWidth) {
      sum_tile<Sums, kVectors>(n, channels, c, kWidth, sums, first, term);
    }
    for (; c + kWidth <= channels; c += kWidth) {
      sum_tile<Sums, 1>(n, channels, c, kWidth, sums, first, term);
    }
    if (c < channels) sum_tile<Sums, 1>(n, channels, c, (int)(channels - c), sums, first, term);
  }
}

}  // namespace wus::cpu::WUS_ISA
