#pragma once

namespace wus::cpu::WUS_ISA {

// One dimension of each scheme: y = At [(G g) * (Bt d)] with kPatch inputs d, kPoints products and
// kTile outputs y. weight_adjoint is Gt.
//
// Where a scheme is local, an output is made from nothing but its receptive field. Elsewhere inputs
// outside of it enter too and cancel up to rounding: `sees` tells which inputs an output should
// hang on, and each output sees one of kWitnesses.
//
// Whatever products reach outputs that should not hang on them, reach one that is watched.

// F(4,3) at the points 0, 1, -1, 1/2, -2 and infinity, whose rounding error is below that of the
// usual 0, +-1, +-2.
struct F4 {
  static constexpr int kTile = 4, kPatch = 6, kPoints = 6;
  static constexpr bool kLocal = false;
  static constexpr int kWitnesses[] = {2, 3};
  static constexpr bool sees(int output, int input) {
    return input >= output && input < output + 3;
  }
  static constexpr bool watches(int output) { return output % 3 == 0; }
  static WUS_INLINE void input(const Vec* d, Vec* v) {
    const Vec even = d[4] - d[2], odd = d[3] - d[1];
    v[0] = 1.5f * odd + (d[0] + (d[4] - 2.f * d[2]));
    v[1] = 2.5f * d[3] + (0.5f * d[2] + (d[4] - d[1]));
    v[2] = 0.5f * d[3] + ((d[4] + d[1]) - 2.5f * d[2]);
    v[3] = 2.f * odd + even;
    v[4] = even - 0.5f * odd;
    v[5] = 1.5f * even + (d[1] + (d[5] - 2.f * d[3]));
  }
  static WUS_INLINE void output(const Vec* m, Vec* y) {
    const Vec sum = m[1] + m[2], difference = m[1] - m[2];
    y[0] = (m[0] + sum) + (m[3] + m[4]);
    y[1] = 0.5f * m[3] + (difference - 2.f * m[4]);
    y[2] = 0.25f * m[3] + (4.f * m[4] + sum);
    y[3] = (0.125f * m[3] + difference) + (m[5] - 8.f * m[4]);
  }
  static WUS_INLINE void weight(const Vec* g, Vec* u) {
    const Vec ends = g[0] + g[2];
    u[0] = g[0];
    u[1] = (ends + g[1]) * (1.f / 3);
    u[2] = (g[1] - ends) * (1.f / 3);
    u[3] = (g[0] + 0.5f * g[1] + 0.25f * g[2]) * (-16.f / 15);
    u[4] = (g[0] - 2.f * g[1] + 4.f * g[2]) * (1.f / 15);
    u[5] = g[2];
  }
  static WUS_INLINE void weight_adjoint(const Vec* u, Vec* g) {
    const Vec sum = (u[1] + u[2]) * (1.f / 3), difference = (u[1] - u[2]) * (1.f / 3);
    const Vec third = u[3] * (-4.f / 15), fourth = u[4] * (1.f / 15);
    g[0] = (u[0] + difference) + (4.f * third + fourth);
    g[1] = sum + (2.f * third - 2.f * fourth);
    g[2] = (u[5] + difference) + (third + 4.f * fourth);
  }
};

// F(2,3) at the points 0, 1, -1 and infinity.
struct F2 {
  static constexpr int kTile = 2, kPatch = 4, kPoints = 4;
  static constexpr bool kLocal = true;
  static constexpr bool watches(int) { return true; }
  static WUS_INLINE void input(const Vec* d, Vec* v) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[3] - d[1];
  }
  static WUS_INLINE void output(const Vec* m, Vec* y) {
    y[0] = (m[0] + m[1]) + m[2];
    y[1] = (m[1] - m[2]) + m[3];
  }
  static WUS_INLINE void weight(const Vec* g, Vec* u) {
    const Vec ends = g[0] + g[2];
    u[0] = g[0];
    u[1] = 0.5f * (ends + g[1]);
    u[2] = 0.5f * (ends - g[1]);
    u[3] = g[2];
  }
  static WUS_INLINE void weight_adjoint(const Vec* u, Vec* g) {
    const Vec half = 0.5f * (u[1] + u[2]);
    g[0] = u[0] + half;
    g[1] = 0.5f * (u[1] - u[2]);
    g[2] = u[3] + half;
  }
};

// Two pixels a, b between zeros: g1 a + g2 b and g0 a + g1 b share the product g1 (a + b).
struct Z2 {
  static constexpr int kTile = 2, kPatch = 2, kPoints = 3;
  static constexpr bool kLocal = true;
  static constexpr bool watches(int) { return true; }
  static WUS_INLINE void input(const Vec* d, Vec* v) {
    v[0] = d[0] + d[1];
    v[1] = d[1];
    v[2] = d[0];
  }
  static WUS_INLINE void output(const Vec* m, Vec* y) {
    y[0] = m[0] + m[1];
    y[1] = m[0] + m[2];
  }
  static WUS_INLINE void weight(const Vec* g, Vec* u) {
    u[0] = g[1];
    u[1] = g[2] - g[1];
    u[2] = g[0] - g[1];
  }
  static WUS_INLINE void weight_adjoint(const Vec* u, Vec* g) {
    g[0] = u[2];
    g[1] = u[0] - (u[1] + u[2]);
    g[2] = u[1];
  }
};

// The weight gradient's view of a scheme: the patch is a tile of the output's gradient, and the
// transform of it is A.

struct F4Grad {
  static constexpr int kTile = 4, kPatch = 4, kPoints = 6;
  static constexpr bool kLocal = true;
  static WUS_INLINE void input(const Vec* d, Vec* v) {
    const Vec even = d[0] + d[2], odd = d[1] + d[3];
    v[0] = d[0];
    v[1] = even + odd;
    v[2] = even - odd;
    v[3] = (d[0] + 0.25f * d[2]) + (0.5f * d[1] + 0.125f * d[3]);
    v[4] = (d[0] + 4.f * d[2]) - (2.f * d[1] + 8.f * d[3]);
    v[5] = d[3];
  }
};

struct F2Grad {
  static constexpr int kTile = 2, kPatch = 2, kPoints = 4;
  static constexpr bool kLocal = true;
  static WUS_INLINE void input(const Vec* d, Vec* v) {
    v[0] = d[0];
    v[1] = d[0] + d[1];
    v[2] = d[0] - d[1];
    v[3] = d[1];
  }
};

struct Z2Grad {
  static constexpr int kTile = 2, kPatch = 2, kPoints = 3;
  static constexpr bool kLocal = true;
  static WUS_INLINE void input(const Vec* d, Vec* v) {
    v[0] = d[0] + d[1];
    v[1] = d[0];
    v[2] = d[1];
  }
};

// One pixel, as it is.
struct Pixelwise {
  static constexpr int kTile = 1, kPatch = 1, kPoints = 1;
  static constexpr bool kLocal = true;
  static WUS_INLINE void input(const Vec* d, Vec* v) { v[0] = d[0]; }
};

}  // namespace wus::cpu::WUS_ISA
