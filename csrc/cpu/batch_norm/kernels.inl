#include "cpu/batch_norm/kernels.h"
#include "cpu/elementwise/pool_window.h"

namespace wus::cpu::WUS_ISA {
namespace batch_norm {

template <int Vectors>
WUS_INLINE void moments_tile(const float* x, int64_t rows, int64_t channels, double* sum,
                             double* squares) {
  DVec s[Vectors] = {}, q[Vectors] = {};
  for (int64_t r = 0; r < rows; ++r) {
    for (int v = 0; v < Vectors; ++v) {
      const DVec d = load_widened(x + r * channels + v * kDoubleWidth);
      s[v] += d;
      q[v] += d * d;
    }
  }
  for (int v = 0; v < Vectors; ++v) {
    add_to(sum + v * kDoubleWidth, s[v]);
    add_to(squares + v * kDoubleWidth, q[v]);
  }
}

void moments(const float* x, int64_t rows, int64_t channels, double* moments) {
  constexpr int kVectors = 4;
  double* squares = moments + channels;
  for (int64_t first = 0; first < rows; first += kChain) {
    const int64_t n = rows - first < kChain ? rows - first : kChain;
    const float* block = x + first * channels;
    int64_t c = 0;
    for (; c + kVectors * kDoubleWidth <= channels; c += kVectors * kDoubleWidth) {
      moments_tile<kVectors>(block + c, n, channels, moments + c, squares + c);
    }
    for (; c + kDoubleWidth <= channels; c += kDoubleWidth) {
      moments_tile<1>(block + c, n, channels, moments + c, squares + c);
    }
    for (; c < channels; ++c) {
      for (int64_t r = 0; r < n; ++r) {
        const double d = block[r * channels + c];
        moments[c] += d;
        squares[c] += d * d;
      }
    }
  }
}

// Forward and backward must decide alike where ReLU passes: one expression for both.
WUS_INLINE Vec affine(const float* x, const float* scale, const float* shift, int64_t i, int64_t c,
                      int lanes) {
  return load(x + i, lanes) * load(scale + c, lanes) + load(shift + c, lanes);
}

template <int Act, bool kResidual>
WUS_INLINE void apply_rows(const BatchNorm& op, int64_t begin, int64_t end, float* output,
                           uint8_t* mask) {
  const BatchNorm o = op;
  const auto value = [=](int64_t row, int64_t c, int lanes) WUS_INLINE_LAMBDA {
    const int64_t i = row * o.channels + c;
    Vec y = affine(o.x, o.scale, o.shift, i, c, lanes);
    if (kResidual) y += load(o.residual + i, lanes);
    return y;
  };
  if (Act == kReluMaxPool) {
    max_pool(o.height, o.width, o.channels, true, begin, end, value, output, mask);
    return;
  }
  const int64_t bytes = mask_bytes(o.channels);
  for (int64_t r = begin; r < end; ++r) {
    for_channels(o.channels, [=](int64_t c, int lanes) WUS_INLINE_LAMBDA {
      Vec y = value(r, c, lanes);
      if (Act != kNone) {
        const IVec keep = relu_mask(y);
        y = select(keep, y, zero());
        if (Act == kReluMask) store_bits(mask + r * bytes + c / 8, to_bits(keep), lanes);
      }
      store(output + r * o.channels + c, y, lanes);
    });
  }
}

void apply(const BatchNorm& op, int64_t begin, int64_t end, float* output, uint8_t* mask) {
  if (op.residual) {
    switch (op.act) {
      case kNone:
        return apply_rows<kNone, true>(op, begin, end, output, mask);
      case kReluMask:
        return apply_rows<kReluMask, true>(op, begin, end, output, mask);
    }
  } else {
    switch (op.act) {
      case kNone:
        return apply_rows<kNone, false>(op, begin, end, output, mask);
      case kReluMask:
        return apply_rows<kReluMask, false>(op, begin, end, output, mask);
      case kReluMaxPool:
        return apply_rows<kReluMaxPool, false>(op, begin, end, output, mask);
      case kReluRecompute:
        return apply_rows<kReluRecompute, false>(op, begin, end, output, mask);
    }
  }
}

// The gradient that passes the activation, at a row of the input.
template <int Act>
WUS_INLINE Vec gated(const BatchNormGrad& op, int64_t row, int64_t c, int lanes) {
  const int64_t i = row * op.channels + c;
  const Vec g = load(op.grad + i, lanes);
  if (Act == kNone) return g;
  IVec keep;
  if (Act == kReluMask) {
    keep = from_bits(load_bits(op.mask + row * mask_bytes(op.channels) + c / 8, lanes));
  } else {
    keep = relu_mask(affine(op.x, op.scale, op.shift, i, c, lanes));
  }
  return select(keep, g, zero());
}

template <int Act>
WUS_INLINE void sum_gated(const BatchNormGrad& op, const float* mean, int64_t begin, int64_t end,
                          double* sums) {
  const BatchNormGrad o = op;
  sum_rows<2>(end - begin, o.channels, sums,
              [=](int64_t r, int64_t c, int lanes, Vec* total) WUS_INLINE_LAMBDA {
                const Vec g = gated<Act>(o, begin + r, c, lanes);
                const Vec x = load(o.x + (begin + r) * o.channels + c, lanes);
                total[0] += g;
                total[1] += g * (x - load(mean + c, lanes));
              });
}

// Of each window only the element that won passes a gradient.
WUS_INLINE void sum_unpooled(const BatchNormGrad& op, const float* mean, int64_t begin, int64_t end,
                             double* sums) {
  const BatchNormGrad o = op;
  Window window(o.height, o.width, begin);
  for (int64_t first = begin; first < end; first += kChain) {
    const int64_t n = end - first < kChain ? end - first : kChain;
    int64_t origins[kChain];
    for (int64_t r = 0; r < n; ++r, window.next()) origins[r] = window.origin;
    const int64_t* origin = origins;
    sum_rows<2>(n, o.channels, sums,
                [=](int64_t r, int64_t c, int lanes, Vec* total) WUS_INLINE_LAMBDA {
                  const int64_t i = (first + r) * o.channels + c;
                  const IVec code = load_bytes(o.mask + i, lanes);
                  const float* corner = o.x + origin[r] * o.channels + c;
                  const float* below = corner + o.width * o.channels;
                  Vec x = load(corner, lanes);
                  x = select(code == 1, load(corner + o.channels, lanes), x);
                  x = select(code == 2, load(below, lanes), x);
                  x = select(code == 3, load(below + o.channels, lanes), x);
                  const IVec blocked = code == kNothingPositive;
                  const Vec g = select(blocked, zero(), load(o.grad + i, lanes));
                  total[0] += g;
                  total[1] += g * (x - load(mean + c, lanes));
                });
  }
}

void grad_sums(const BatchNormGrad& op, const float* mean, int64_t begin, int64_t end,
               double* sums) {
  switch (op.act) {
    case kNone:
      return sum_gated<kNone>(op, mean, begin, end, sums);
    case kReluMask:
      return sum_gated<kReluMask>(op, mean, begin, end, sums);
    case kReluMaxPool:
      return sum_unpooled(op, mean, begin, end, sums);
    case kReluRecompute:
      return sum_gated<kReluRecompute>(op, mean, begin, end, sums);
  }
}

struct Coefficients {
  const float *a, *b, *c0;

  WUS_INLINE Vec operator()(Vec g, Vec x, int64_t c, int lanes) const {
    return load(a + c, lanes) * g + (load(b + c, lanes) * x + load(c0 + c, lanes));
  }
};

template <int Act, bool kResidual>
WUS_INLINE void grad_gated(const BatchNormGrad& op, Coefficients coefficients, int64_t begin,
                           int64_t end, float* grad_input, float* grad_residual) {
  const BatchNormGrad o = op;
  for (int64_t r = begin; r < end; ++r) {
    for_channels(o.channels, [=](int64_t c, int lanes) WUS_INLINE_LAMBDA {
      const int64_t i = r * o.channels + c;
      const Vec g = gated<Act>(o, r, c, lanes);
      if (kResidual) store(grad_residual + i, g, lanes);
      store(grad_input + i, coefficients(g, load(o.x + i, lanes), c, lanes), lanes);
    });
  }
}

WUS_INLINE void grad_unpooled(const BatchNormGrad& op, Coefficients coefficients, int64_t begin,
                              int64_t end, float* grad_input) {
  const BatchNormGrad o = op;
  Window window(o.height, o.width, begin);
  for (int64_t r = begin; r < end; ++r, window.next()) {
    for_channels(o.channels, [=](int64_t c, int lanes) WUS_INLINE_LAMBDA {
      const Vec g = load(o.grad + r * o.channels + c, lanes);
      const IVec code = load_bytes(o.mask + r * o.channels + c, lanes);
      window.for_pixels([=](int64_t pixel, int position) WUS_INLINE_LAMBDA {
        const int64_t i = pixel * o.channels + c;
        const Vec passed = select(code == position, g, zero());
        store(grad_input + i, coefficients(passed, load(o.x + i, lanes), c, lanes), lanes);
      });
    });
  }
}

void grad_input(const BatchNormGrad& op, const float* a, const float* b, const float* c0,
                int64_t begin, int64_t end, float* grad_input, float* grad_residual) {
  const Coefficients k = {a, b, c0};
  switch (op.act) {
    case kNone:
      return grad_gated<kNone, false>(op, k, begin, end, grad_input, nullptr);
    case kReluMask:
      if (grad_residual) {
        return grad_gated<kReluMask, true>(op, k, begin, end, grad_input, grad_residual);
      }
      return grad_gated<kReluMask, false>(op, k, begin, end, grad_input, nullptr);
    case kReluMaxPool:
      return grad_unpooled(op, k, begin, end, grad_input);
    case kReluRecompute:
      return grad_gated<kReluRecompute, false>(op, k, begin, end, grad_input, nullptr);
  }
}

}  // namespace batch_norm

const BatchNormKernels batch_norm_kernels = {batch_norm::moments, batch_norm::apply,
                                             batch_norm::grad_sums, batch_norm::grad_input};

}  // namespace wus::cpu::WUS_ISA
