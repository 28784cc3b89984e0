// Float vectors for one instruction set.
//
// Kernels are written once against this header and compiled once per instruction set: a translation
// unit such as isa/avx2.cpp sets `#pragma GCC target`, WUS_ISA and WUS_AVX2 (and WUS_AVX512), then
// includes the kernels. (g++ before 13 reads the whole file before it acts on the pragma, so
// __AVX2__ would not be seen.) Everything lives in `wus::cpu::WUS_ISA`, and nothing here includes
// torch or an inline function of the standard library: the linker could keep a copy that holds
// instructions another CPU lacks.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cpu/simd/element.h"

#if defined(WUS_AVX2)
#include <immintrin.h>
#endif

#ifndef WUS_ISA
#error "define WUS_ISA before including simd.h"
#endif

#define WUS_INLINE __attribute__((always_inline)) inline

namespace wus::cpu::WUS_ISA {

#if defined(WUS_AVX512)
constexpr int kWidth = 16;
constexpr int kRegisters = 32;
#elif defined(WUS_AVX2)
constexpr int kWidth = 8;
constexpr int kRegisters = 16;
#else
// Eight lanes everywhere, so that a bit mask always fills whole bytes; the compiler splits them.
constexpr int kWidth = 8;
constexpr int kRegisters = 16;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t IVec __attribute__((vector_size(4 * kWidth)));
typedef float UnalignedVec __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));

// a * b + c contracts to a fused multiply-add where the target has one (-ffp-contract=fast).

WUS_INLINE Vec zero() { return Vec{}; }
WUS_INLINE Vec broadcast(float x) { return x - Vec{}; }
WUS_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
WUS_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }

// Stores past the caches, to an address aligned to a vector, where that is a whole cache line.
WUS_INLINE void stream(float* p, Vec v) {
#if defined(WUS_AVX512)
  _mm512_stream_ps(p, (__m512)v);
#else
  store(p, v);
#endif
}
// What was streamed is there for other threads from here on.
WUS_INLINE void end_streams() {
#if defined(WUS_AVX512)
  _mm_sfence();
#endif
}

WUS_INLINE Vec absolute(Vec v) { return (Vec)((IVec)v & INT32_MAX); }
WUS_INLINE Vec select(IVec mask, Vec a, Vec b) { return mask ? a : b; }

// The first n lanes; the others read as zero and are not touched in memory. 0 < n <= kWidth.
WUS_INLINE Vec load_first(const float* p, int n) {
#if defined(WUS_AVX512)
  return (Vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
  Vec v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}

WUS_INLINE void store_first(float* p, Vec v, int n) {
#if defined(WUS_AVX512)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
  for (int i = 0; i < n && i < kWidth; ++i) p[i] = v[i];
#endif
}

// Bit i of the result is lane i of the mask. Masks in memory hold element c of a pixel in bit c % 8
// of byte c / 8; a pixel's row of C channels takes ceil(C / 8) bytes.
WUS_INLINE uint32_t to_bits(IVec mask) {
#if defined(WUS_AVX512)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(WUS_AVX2)
  return (uint32_t)_mm256_movemask_ps((__m256)mask);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= (uint32_t)(mask[i] & 1) << i;
  return bits;
#endif
}

WUS_INLINE IVec from_bits(uint32_t bits) {
#if defined(WUS_AVX512)
  return (IVec)_mm512_maskz_set1_epi32((__mmask16)bits, -1);
#elif defined(WUS_AVX2)
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32((int)bits), lane);
  return (IVec)_mm256_cmpeq_epi32(set, lane);
#else
  IVec mask;
  for (int i = 0; i < kWidth; ++i) mask[i] = -(int32_t)(bits >> i & 1);
  return mask;
#endif
}

WUS_INLINE uint32_t load_bits(const uint8_t* p) {
  uint32_t bits = p[0];
  if (kWidth == 16) bits |= (uint32_t)p[1] << 8;
  return bits;
}

WUS_INLINE void store_bits(uint8_t* p, uint32_t bits) {
  p[0] = (uint8_t)bits;
  if (kWidth == 16) p[1] = (uint8_t)(bits >> 8);
}

// Bytes, one a lane, widened to int32 and back (values 0 to 255).
WUS_INLINE IVec load_bytes(const uint8_t* p) {
#if defined(WUS_AVX512)
  return (IVec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(WUS_AVX2)
  return (IVec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  IVec v;
  for (int i = 0; i < kWidth; ++i) v[i] = p[i];
  return v;
#endif
}

WUS_INLINE void store_bytes(uint8_t* p, IVec v) {
#if defined(WUS_AVX512)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v));
#elif defined(WUS_AVX2)
  const __m128i low = _mm256_castsi256_si128((__m256i)v);
  const __m128i high = _mm256_extracti128_si256((__m256i)v, 1);
  const __m128i words = _mm_packus_epi32(low, high);
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(words, words));
#else
  for (int i = 0; i < kWidth; ++i) p[i] = (uint8_t)v[i];
#endif
}

// The same of the first n elements, which are all that is touched; the other lanes read as zero.
WUS_INLINE uint32_t load_bits_first(const uint8_t* p, int n) {
  uint32_t bits = p[0];
  if (n > 8) bits |= (uint32_t)p[1] << 8;
  return bits & ((1u << n) - 1);
}

WUS_INLINE void store_bits_first(uint8_t* p, uint32_t bits, int n) {
  bits &= (1u << n) - 1;
  p[0] = (uint8_t)bits;
  if (n > 8) p[1] = (uint8_t)(bits >> 8);
}

WUS_INLINE IVec load_bytes_first(const uint8_t* p, int n) {
  IVec v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
}

WUS_INLINE void store_bytes_first(uint8_t* p, IVec v, int n) {
  for (int i = 0; i < n; ++i) p[i] = (uint8_t)v[i];
}

// bfloat16, rounded to the nearest, of equally near ones to the even one.

typedef uint32_t UVec __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
typedef uint16_t UnalignedHalves __attribute__((vector_size(2 * kWidth), aligned(2), may_alias));

WUS_INLINE Vec widened(Halves v) { return (Vec)(__builtin_convertvector(v, UVec) << 16); }
WUS_INLINE Halves rounded(Vec v) {
  const UVec bits = (UVec)v;
  const UVec nearest = (bits + (0x7fff + (bits >> 16 & 1))) >> 16;
  return __builtin_convertvector(v == v ? nearest : (bits >> 16 | 0x40), Halves);
}

WUS_INLINE Vec load(const Bf16* p) { return widened(*reinterpret_cast<const UnalignedHalves*>(p)); }
WUS_INLINE void store(Bf16* p, Vec v) { *reinterpret_cast<UnalignedHalves*>(p) = rounded(v); }

WUS_INLINE Vec load_first(const Bf16* p, int n) {
#if defined(WUS_AVX512)
  return widened((Halves)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p));
#else
  Halves v{};
  for (int i = 0; i < n && i < kWidth; ++i) v[i] = p[i].bits;
  return widened(v);
#endif
}

WUS_INLINE void store_first(Bf16* p, Vec v, int n) {
#if defined(WUS_AVX512)
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)rounded(v));
#else
  const Halves halves = rounded(v);
  for (int i = 0; i < n && i < kWidth; ++i) p[i].bits = halves[i];
#endif
}

// What torch's threshold_backward keeps: not (y <= 0), so NaN passes its gradient on.
WUS_INLINE IVec relu_mask(Vec y) { return ~(y <= zero()); }

}  // namespace wus::cpu::WUS_ISA
