#include "cpu/batch_norm/kernels.h"
#include "cpu/pool/windows.inl"

namespace wus::cpu::WUS_ISA {
namespace batch_norm {

template <int Vectors, class T>
WUS_INLINE void moments_tile(const T* x, int64_t rows, int64_t channels, double* sum,
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

template <class T>
void moments(const T* x, int64_t rows, int64_t channels, double* moments) {
  constexpr int kVectors = 4;
  double* squares = moments + channels;
  for (int64_t first = 0; first < rows; first += kChain) {
    const int64_t n = rows - first < kChain ? rows - first : kChain;
    const T* block = x + first * channels;
    int64_t c = 0;
    for (; c + kVectors * kDoubleWidth <= channels; c += kVectors * kDoubleWidth) {
      moments_tile<kVectors>(block + c, n, channels, moments + c, squares + c);
    }
    for (; c + kDoubleWidth <= channels; c += kDoubleWidth) {
      moments_tile<1>(block + c, n, channels, moments + c, squares + c);
    }
    for (; c < channels; ++c) {
      for (int64_t r = 0; r < n; ++r) {
        const double d = widened(block + r * channels + c);
        moments[c] += d;
        squares[c] += d * d;
      }
    }
  }
}

template <class T>
void pool(const PooledNorm<T>& op, int64_t begin, int64_t end, T* output, uint8_t* code) {
  const PooledNorm<T> o = op;
  max_pool(
      o.shape, o.channels, o.relu, begin, end,
      [=](int64_t row, int64_t c, int lanes) WUS_INLINE_LAMBDA {
        return activation::affine(load(o.x + row * o.channels + c, lanes), o.scale, o.shift, c,
                                  lanes);
      },
      output, code);
}

// Of each window only the element that won passes a gradient.
template <int kKernel, class T>
WUS_INLINE void sum_winners(const PooledNormGrad<T>& op, const float* mean, int64_t begin,
                            int64_t end, double* sums) {
  const PooledNormGrad<T> o = op;
  PoolWindow window(o.shape, begin);
  for (int64_t first = begin; first < end; first += kChain) {
    const int64_t n = end - first < kChain ? end - first : kChain;
    struct {
      int64_t origin;
      Extent rows, cols;
    } windows[kChain];
    for (int64_t r = 0; r < n; ++r, window.next()) {
      windows[r] = {window.origin(), inside(window.top(), o.shape.kernel, o.shape.height),
                    inside(window.left(), o.shape.kernel, o.shape.width)};
    }
    const auto* at = windows;
    sum_rows<2>(n, o.channels, sums,
                [=](int64_t r, int64_t c, int lanes, Vec* total) WUS_INLINE_LAMBDA {
                  const int64_t i = (first + r) * o.channels + c;
                  const IVec code = load_bytes(o.code + i, lanes);
                  const T* origin = o.x + at[r].origin * o.channels + c;
                  Vec x = zero();
                  for_window<kKernel>(
                      at[r].rows, at[r].cols, [&](int64_t dy, int64_t dx) WUS_INLINE_LAMBDA {
                        const IVec won = code == (int32_t)(dy * o.shape.kernel + dx);
                        const T* pixel = origin + (dy * o.shape.width + dx) * o.channels;
                        x = select(won, load(pixel, lanes), x);
                      });
                  const IVec blocked = code == o.shape.blocked();
                  const Vec g = select(blocked, zero(), load(o.grad + i, lanes));
                  total[0] += g;
                  total[1] += g * (x - load(mean + c, lanes));
                });
  }
}

template <class T>
void pool_grad_sums(const PooledNormGrad<T>& op, const float* mean, int64_t begin, int64_t end,
                    double* sums) {
  switch (op.shape.kernel) {
    case 2:
      return sum_winners<2>(op, mean, begin, end, sums);
    case 3:
      return sum_winners<3>(op, mean, begin, end, sums);
    default:
      return sum_winners<0>(op, mean, begin, end, sums);
  }
}

template <class T>
void pool_grad_input(const PooledNormGrad<T>& op, const NormCoefficients& coefficients,
                     int64_t begin, int64_t end, T* grad_input) {
  const NormCoefficients k = coefficients;
  const T* x = op.x;
  const int64_t channels = op.channels;
  unpool_pixels(op.shape, channels, op.grad, op.code, begin, end,
                [=](int64_t pixel, int64_t c, int lanes, Vec g) WUS_INLINE_LAMBDA {
                  const int64_t i = pixel * channels + c;
                  const Vec rest = load(k.b + c, lanes) * load(x + i, lanes) + load(k.c + c, lanes);
                  store(grad_input + i, load(k.a + c, lanes) * g + rest, lanes);
                });
}

}  // namespace batch_norm

template <class T>
const BatchNormKernels<T>& batch_norm_kernels() {
  static constexpr BatchNormKernels<T> table = {batch_norm::moments<T>, batch_norm::pool<T>,
                                                batch_norm::pool_grad_sums<T>,
                                                batch_norm::pool_grad_input<T>};
  return table;
}
template const BatchNormKernels<float>& batch_norm_kernels();
template const BatchNormKernels<Bf16>& batch_norm_kernels();

}  // namespace wus::cpu::WUS_ISA
