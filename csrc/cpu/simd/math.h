// Elementary functions of float vectors, to a few units in the last place; NaN stays NaN.
#pragma once

#include "cpu/simd/simd.h"

namespace wus::cpu::WUS_ISA {

// A polynomial, highest power first.
template <int kTerms>
WUS_INLINE Vec polynomial(const float (&coefficients)[kTerms], Vec x) {
  Vec y = broadcast(coefficients[0]);
#pragma GCC unroll 16
  for (int i = 1; i < kTerms; ++i) y = y * x + broadcast(coefficients[i]);
  return y;
}

// 2^n for whole -126 <= n <= 127.
WUS_INLINE Vec power_of_two(IVec n) { return (Vec)((n + 127) << 23); }

WUS_INLINE Vec exp(Vec x) {
  x = select(x > broadcast(89.f), broadcast(89.f), x);
  x = select(x < broadcast(-104.f), broadcast(-104.f), x);
  const Vec magic = broadcast(12582912.f);  // 1.5 * 2^23 rounds to whole numbers
  const Vec n = (x * broadcast(1.44269504f) + magic) - magic;
  // ln 2 in two parts, of which n times the first is exact.
  const Vec r = (x - n * broadcast(0.693145752f)) - n * broadcast(1.42860677e-6f);
  const float tail[] = {1.3814467e-3f, 8.3687808e-3f, 4.1668393e-2f, 0.1666652f, 0.49999994f};
  const Vec y = polynomial(tail, r) * (r * r) + r + broadcast(1.f);
  // In two steps, as n goes down to -150 and up to 128.
  const IVec whole = __builtin_convertvector(select(x == x, n, zero()), IVec), half = whole >> 1;
  return y * power_of_two(half) * power_of_two(whole - half);
}

WUS_INLINE Vec sigmoid(Vec x) { return broadcast(1.f) / (broadcast(1.f) + exp(-x)); }

// The sigmoid and what it lacks to 1, both exact to a few units in the last place.
struct Shares {
  Vec passed, held;
};

WUS_INLINE Shares sigmoid_shares(Vec x) {
  const Vec e = exp(-x), passed = broadcast(1.f) / (broadcast(1.f) + e);
  return {passed, select(x < broadcast(-88.f), broadcast(1.f), e * passed)};  // e may be infinite
}

// The normal distribution and its density: the one by erfc(|z|) = t * q(t) * exp(-z^2) with
// t = 1 / (1 + 0.45 |z|) and z = x / sqrt(2).
struct Normal {
  Vec distribution, density;
};

WUS_INLINE Normal normal(Vec x) {
  const Vec magnitude = (Vec)((IVec)x & 0x7fffffff);
  const Vec falling = exp(x * x * broadcast(-0.5f));
  const Vec t = broadcast(1.f) / (magnitude * broadcast(0.318198052f) + broadcast(1.f));
  const float q[] = {-4.13911566e-2f, 0.190688089f, -0.300582856f, 0.142401397f, -2.23582238e-2f,
                     0.119950548f,    0.175252095f, 0.228271648f,  0.253883153f, 0.253885329f};
  const Vec tail = polynomial(q, t) * t * falling * broadcast(0.5f);
  return {select(x > zero(), broadcast(1.f) - tail, tail), falling * broadcast(0.398942280f)};
}

}  // namespace wus::cpu::WUS_ISA
