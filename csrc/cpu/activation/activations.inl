// Each activation as a type: its value, and the gradient that it passes, from a bit that tells
// which of two slopes holds (kBits) or from its input. Edges are stock
// PyTorch's; NaN passes its gradient on where stock's own kernels do not agree.
#pragma once

#include "common/activation.h"
#include "cpu/simd/math.h"

namespace wus::cpu::WUS_ISA {

struct Identity {
  static constexpr bool kBits = false;
  static WUS_INLINE Vec value(Vec x, Vec) { return x; }
  static WUS_INLINE Vec gradient(Vec, Vec g, Vec) { return g; }
};

// What two-piece activations share: Piece says where the first slope holds, and applies a slope.
template <class Piece>
struct TwoSlopes : Piece {
  static constexpr bool kBits = true;
  static WUS_INLINE Vec gradient(Vec x, Vec g, Vec slope) {
    return Piece::pass(Piece::keep(x), g, slope);
  }
};

struct ReluPieces {
  static WUS_INLINE IVec keep(Vec x) { return relu_mask(x); }
  static WUS_INLINE Vec value(Vec x, Vec) { return select(keep(x), x, zero()); }
  static WUS_INLINE Vec pass(IVec keep, Vec g, Vec) { return select(keep, g, zero()); }
};
using Relu = TwoSlopes<ReluPieces>;

struct Relu6Pieces {
  static WUS_INLINE IVec keep(Vec x) { return ~((x <= zero()) | (x >= broadcast(6.f))); }
  static WUS_INLINE Vec value(Vec x, Vec) {
    const Vec y = select(relu_mask(x), x, zero());
    return select(y > broadcast(6.f), broadcast(6.f), y);
  }
  static WUS_INLINE Vec pass(IVec keep, Vec g, Vec) { return select(keep, g, zero()); }
};
using Relu6 = TwoSlopes<Relu6Pieces>;

struct LeakyReluPieces {
  static WUS_INLINE IVec keep(Vec x) { return x > zero(); }
  static WUS_INLINE Vec value(Vec x, Vec slope) { return select(keep(x), x, x * slope); }
  static WUS_INLINE Vec pass(IVec keep, Vec g, Vec slope) { return select(keep, g, g * slope); }
};
using LeakyRelu = TwoSlopes<LeakyReluPieces>;

// min(max(x + 3, 0), 6)
WUS_INLINE Vec hard_ramp(Vec x) { return Relu6::value(x + broadcast(3.f), zero()); }

struct HardsigmoidPieces {
  static WUS_INLINE IVec keep(Vec x) { return (x > broadcast(-3.f)) & (x < broadcast(3.f)); }
  static WUS_INLINE Vec value(Vec x, Vec) { return hard_ramp(x) / broadcast(6.f); }
  static WUS_INLINE Vec pass(IVec keep, Vec g, Vec) {
    return select(keep, g * broadcast(1.f / 6.f), zero());
  }
};
using Hardsigmoid = TwoSlopes<HardsigmoidPieces>;

struct Hardswish {
  static constexpr bool kBits = false;
  static WUS_INLINE Vec value(Vec x, Vec) { return x * hard_ramp(x) / broadcast(6.f); }
  static WUS_INLINE Vec gradient(Vec x, Vec g, Vec) {
    const Vec rising = g * (x / broadcast(3.f) + broadcast(0.5f));
    return select(x <= broadcast(-3.f), zero(), select(x < broadcast(3.f), rising, g));
  }
};

struct Silu {
  static constexpr bool kBits = false;
  static WUS_INLINE Vec value(Vec x, Vec) { return x / (broadcast(1.f) + exp(-x)); }
  static WUS_INLINE Vec gradient(Vec x, Vec g, Vec) {
    const Shares s = sigmoid_shares(x);
    return g * s.passed * (x * s.held + broadcast(1.f));
  }
};

struct Sigmoid {
  static constexpr bool kBits = false;
  static WUS_INLINE Vec value(Vec x, Vec) { return sigmoid(x); }
  static WUS_INLINE Vec gradient(Vec x, Vec g, Vec) {
    const Shares s = sigmoid_shares(x);
    return g * (s.passed * s.held);
  }
};

struct Gelu {
  static constexpr bool kBits = false;
  static WUS_INLINE Vec value(Vec x, Vec) { return x * normal(x).distribution; }
  static WUS_INLINE Vec gradient(Vec x, Vec g, Vec) {
    const Normal n = normal(x);
    return g * (x * n.density + n.distribution);
  }
};

// x * (1 + tanh(u)) / 2 with u = sqrt(2 / pi) * (x + 0.044715 x^3), and (1 + tanh(u)) / 2 is the
// sigmoid of 2 u.
struct GeluTanh {
  static constexpr bool kBits = false;
  static constexpr float kOuter = 1.59576912f, kInner = 0.044715f;
  static WUS_INLINE Vec twice_u(Vec x) {
    return x * (x * x * broadcast(kInner) + broadcast(1.f)) * broadcast(kOuter);
  }
  static WUS_INLINE Vec value(Vec x, Vec) { return x * sigmoid(twice_u(x)); }
  static WUS_INLINE Vec gradient(Vec x, Vec g, Vec) {
    const Shares s = sigmoid_shares(twice_u(x));
    const Vec slope = (x * x * broadcast(3.f * kInner) + broadcast(1.f)) * broadcast(kOuter);
    return g * s.passed * (x * s.held * slope + broadcast(1.f));
  }
};

// body(an activation of the type that `act` names)
template <class Body>
WUS_INLINE void for_activation(int act, const Body& body) {
  switch (act) {
    case kNone:
      return body(Identity{});
    case kRelu:
      return body(Relu{});
    case kRelu6:
      return body(Relu6{});
    case kLeakyRelu:
      return body(LeakyRelu{});
    case kHardsigmoid:
      return body(Hardsigmoid{});
    case kHardswish:
      return body(Hardswish{});
    case kSilu:
      return body(Silu{});
    case kSigmoid:
      return body(Sigmoid{});
    case kGelu:
      return body(Gelu{});
    case kGeluTanh:
      return body(GeluTanh{});
  }
}

}  // namespace wus::cpu::WUS_ISA
