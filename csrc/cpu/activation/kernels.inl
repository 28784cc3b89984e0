#include "cpu/activation/activations.inl"
#include "cpu/activation/kernels.h"
#include "cpu/simd/simd_rows.h"

namespace wus::cpu::WUS_ISA {
namespace activation {

// Forward and backward must decide alike which slope holds: one expression for both.
WUS_INLINE Vec affine(Vec x, const float* scale, const float* shift, int64_t c, int lanes) {
  return x * load(scale + c, lanes) + load(shift + c, lanes);
}

template <class Act, bool kAffine, bool kResidual, class T, class Out>
WUS_INLINE void forward_rows(const Activated<T>& op, int64_t begin, int64_t end,
                             RowsOut<Out> output, uint8_t* mask) {
  const Activated<T> o = op;
  const int64_t bytes = mask_bytes(o.channels);
  for (int64_t r = begin; r < end; ++r) {
    const T* x = o.x + r * o.channels;
    const T* residual = kResidual ? o.residual + r * o.channels : nullptr;
    for_channels(o.channels, [=](int64_t c, int lanes) WUS_INLINE_LAMBDA {
      Vec y = load(x + c, lanes);
      if (kAffine) y = affine(y, o.scale, o.shift, c, lanes);
      if (kResidual) y += load(residual + c, lanes);
      if constexpr (Act::kBits) {
        if (mask) store_bits(mask + c / 8, to_bits(Act::keep(y)), lanes);
      }
      store(output.data + c, Act::value(y, broadcast(o.slope)), lanes);
    });
    output.data += output.stride;
    if (mask) mask += bytes;
  }
}

// Rows as they are, of one type in one piece where they lie and go without gaps.
template <class T, class Out>
WUS_INLINE void copy_rows(const T* rows, int64_t count, int64_t channels, RowsOut<Out> output) {
  const bool dense = output.stride == channels;
  const int64_t pieces = dense ? 1 : count, length = dense ? count * channels : channels;
  for (int64_t r = 0; r < pieces; ++r) {
    const T* from = rows + r * length;
    Out* to = output.data + r * output.stride;
    if constexpr (__is_same(T, Out)) {
      __builtin_memcpy(to, from, length * sizeof(T));
    } else {
      for_channels(length, [=](int64_t c, int lanes)
                               WUS_INLINE_LAMBDA { store(to + c, load(from + c, lanes), lanes); });
    }
  }
}

template <class T, class Out>
void forward(const Activated<T>& op, int64_t begin, int64_t end, RowsOut<Out> output,
             uint8_t* mask) {
  if (op.act == kNone && !op.scale && !op.residual) {
    return copy_rows(op.x + begin * op.channels, end - begin, op.channels, output);
  }
  for_activation(op.act, [&](auto act) WUS_INLINE_LAMBDA {
    using Act = decltype(act);
    if (op.scale) {
      op.residual ? forward_rows<Act, true, true>(op, begin, end, output, mask)
                  : forward_rows<Act, true, false>(op, begin, end, output, mask);
    } else {
      op.residual ? forward_rows<Act, false, true>(op, begin, end, output, mask)
                  : forward_rows<Act, false, false>(op, begin, end, output, mask);
    }
  });
}

enum class Slope { bits, input };
template <Slope kSlope>
struct SlopeFrom {
  static constexpr Slope value = kSlope;
};

template <class Act, Slope kSlope, class T>
WUS_INLINE Vec passed(const ActivationGrad<T>& op, int64_t row, int64_t c, int lanes) {
  const Vec g = load(op.grad + row * op.channels + c, lanes), slope = broadcast(op.slope);
  if constexpr (kSlope == Slope::bits) {
    const uint8_t* bits = op.mask + row * mask_bytes(op.channels) + c / 8;
    return Act::pass(from_bits(load_bits(bits, lanes)), g, slope);
  } else if constexpr (__is_same(Act, Identity)) {
    return g;
  } else {
    Vec x = load(op.x + row * op.channels + c, lanes);
    if (op.scale) x = affine(x, op.scale, op.shift, c, lanes);
    return Act::gradient(x, g, slope);
  }
}

template <class Act, Slope kSlope, bool kNorm, class T, class Out>
WUS_INLINE void backward_rows(const ActivationGrad<T>& op, const NormCoefficients* coefficients,
                              int64_t begin, int64_t end, RowsOut<Out> output, Out* gated) {
  const ActivationGrad<T> o = op;
  const NormCoefficients k = kNorm ? *coefficients : NormCoefficients{};
  for (int64_t r = begin; r < end; ++r) {
    for_channels(o.channels, [=](int64_t c, int lanes) WUS_INLINE_LAMBDA {
      Vec g = passed<Act, kSlope>(o, r, c, lanes);
      if (gated) store(gated + c, g, lanes);
      if (kNorm) {
        const Vec x = load(o.x + r * o.channels + c, lanes);
        g = load(k.a + c, lanes) * g + (load(k.b + c, lanes) * x + load(k.c + c, lanes));
      }
      store(output.data + c, g, lanes);
    });
    output.data += output.stride;
    if (gated) gated += o.channels;
  }
}

template <class Act, Slope kSlope, bool kNorm, class T>
WUS_INLINE void sum_rows_passed(const ActivationGrad<T>& op, const float* mean, int64_t begin,
                                int64_t end, double* sums, T* gated) {
  const ActivationGrad<T> o = op;
  sum_rows<kNorm ? 2 : 1>(end - begin, o.channels, sums,
                          [=](int64_t r, int64_t c, int lanes, Vec* total) WUS_INLINE_LAMBDA {
                            const Vec g = passed<Act, kSlope>(o, begin + r, c, lanes);
                            if (gated) store(gated + r * o.channels + c, g, lanes);
                            total[0] += g;
                            if (kNorm) {
                              const Vec x = load(o.x + (begin + r) * o.channels + c, lanes);
                              total[1] += g * (x - load(mean + c, lanes));
                            }
                          });
}

// body(activation, where its slope comes from)
template <class T, class Body>
WUS_INLINE void for_slope(const ActivationGrad<T>& op, const Body& body) {
  for_activation(op.act, [&](auto act) WUS_INLINE_LAMBDA {
    if constexpr (decltype(act)::kBits) {
      if (op.mask) return body(act, SlopeFrom<Slope::bits>{});
    }
    body(act, SlopeFrom<Slope::input>{});
  });
}

template <class T, class Out>
void backward(const ActivationGrad<T>& op, const NormCoefficients* coefficients, int64_t begin,
              int64_t end, RowsOut<Out> output, Out* gated) {
  if (op.act == kNone && !coefficients && !gated) {
    return copy_rows(op.grad + begin * op.channels, end - begin, op.channels, output);
  }
  for_slope(op, [&](auto act, auto slope) WUS_INLINE_LAMBDA {
    using Act = decltype(act);
    constexpr Slope kSlope = decltype(slope)::value;
    coefficients ? backward_rows<Act, kSlope, true>(op, coefficients, begin, end, output, gated)
                 : backward_rows<Act, kSlope, false>(op, nullptr, begin, end, output, gated);
  });
}

template <class T>
void grad_sums(const ActivationGrad<T>& op, const float* mean, int64_t begin, int64_t end,
               double* sums, T* gated) {
  for_slope(op, [&](auto act, auto slope) WUS_INLINE_LAMBDA {
    using Act = decltype(act);
    constexpr Slope kSlope = decltype(slope)::value;
    mean ? sum_rows_passed<Act, kSlope, true>(op, mean, begin, end, sums, gated)
         : sum_rows_passed<Act, kSlope, false>(op, nullptr, begin, end, sums, gated);
  });
}

}  // namespace activation

template <class T>
const ActivationKernels<T>& activation_kernels() {
  static constexpr ActivationKernels<T> table = {
      activation::forward<T, T>, activation::backward<T, T>, activation::grad_sums<T>,
      activation::forward<float, T>, activation::backward<T, float>};
  return table;
}
template const ActivationKernels<float>& activation_kernels();
template const ActivationKernels<Bf16>& activation_kernels();

}  // namespace wus::cpu::WUS_ISA
