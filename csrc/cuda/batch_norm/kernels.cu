#include "cuda/batch_norm/kernels.h"

#include "common/layout.h"
#include "cuda/elementwise/sums.cuh"

namespace wus::cuda {
namespace {

// Null pointers stand for a weight of 1 and a bias of 0.
__device__ __forceinline__ void store_affine(int64_t c, float mean, float var,
                                             const NormAffine& affine) {
  const double inverse = 1 / sqrt(var + affine.eps);
  const double s = affine.weight ? inverse * affine.weight[c] : inverse;
  affine.invstd[c] = static_cast<float>(inverse);
  affine.scale[c] = static_cast<float>(s);
  affine.shift[c] = static_cast<float>((affine.bias ? affine.bias[c] : 0.0) - mean * s);
}

struct StoreStats {
  double count;
  NormStats out;

  __device__ void operator()(int64_t c, const double (&sums)[2]) const {
    const double m = sums[0] / count;
    const double v = sums[1] / count - m * m;
    float mean = static_cast<float>(m);
    const float var = static_cast<float>(v < 0 ? 0 : v);  // NaN stays NaN
    if (out.running_mean) {
      const float seen = out.offset ? mean + out.offset[c] : mean;
      const double keep = 1 - out.momentum, unbiased = count / (count - 1);
      out.running_mean[c] = static_cast<float>(keep * out.running_mean[c] + out.momentum * seen);
      out.running_var[c] =
          static_cast<float>(keep * out.running_var[c] + out.momentum * (var * unbiased));
    }
    if (out.offset) mean += 0 * out.offset[c];  // what is not finite makes all behind it NaN
    out.mean[c] = mean;
    if (out.var) out.var[c] = var;
    if (out.affine.scale) store_affine(c, mean, var, out.affine);
  }
};

// d loss / d x = gamma * invstd * (g - mean(g) - xhat * mean(g * xhat)) as a * g + b * x + c0, from
// the sums of g and of g * (x - mean).
struct StoreCoefficients {
  double count;
  const float *mean, *invstd, *weight;
  NormCoefficients out;

  __device__ void operator()(int64_t c, const double (&sums)[2]) const {
    const double inverse = invstd[c];
    const double a = weight ? weight[c] * inverse : inverse;
    const double b = -a * inverse * inverse * sums[1] / count;
    out.a[c] = static_cast<float>(a);
    out.b[c] = static_cast<float>(b);
    out.c0[c] = static_cast<float>(-a * sums[0] / count - b * mean[c]);
    out.grad_bias[c] = static_cast<float>(sums[0]);
    out.grad_weight[c] = static_cast<float>(sums[1] * inverse);
  }
};

// A thread sums deviations from the first value that it meets, in float: a large mean costs nothing
// then, and an outlier's own square outweighs what it makes the others lose. Moments about zero,
// which add up, are formed from that in double.
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads, kSumBlocksAnSM)
    moments_kernel(const T* __restrict__ input, double* __restrict__ partial, int64_t rows,
                   int64_t channels) {
  const int64_t first = int64_t{blockIdx.y} * blockDim.y + threadIdx.y, c0 = first_channel();
  Octet<T> pivot = {};
  if (first < rows && c0 < channels) {
    pivot = load<kVector>(input + first * channels + c0,
                          channels - c0 < kOctet ? static_cast<int>(channels - c0) : kOctet);
  }
  float sum[kOctet] = {}, squares[kOctet] = {};
  int n = 0;
  const auto fetch = [=](int64_t r, int64_t c, int lanes) {
    return load<kVector>(input + r * channels + c, lanes);
  };
  const auto add = [=, &sum, &squares, &n](int64_t, int64_t, int, const Octet<T>& x) {
    ++n;
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      const float d = static_cast<float>(x.lane[k]) - static_cast<float>(pivot.lane[k]);
      sum[k] += d;
      squares[k] = fmaf(d, d, squares[k]);
    }
  };
  for_octets<kRowsAtOnce<T, kVector>>(rows, channels, fetch, add);
  double moment[kOctet];
#pragma unroll
  for (int k = 0; k < kOctet; ++k) moment[k] = n * static_cast<double>(pivot.lane[k]) + sum[k];
  leave_partial(moment, channels, partial);
#pragma unroll
  for (int k = 0; k < kOctet; ++k) {
    const double p = static_cast<float>(pivot.lane[k]);
    moment[k] = squares[k] + p * (2.0 * sum[k] + n * p);
  }
  leave_partial(moment, channels, partial + gridDim.y * channels);
}

// How backward knows what passed the activation.
enum class Gate { kOpen, kBits, kValues, kCodes };

template <class T>
struct Row {
  Octet<T> grad, x;
  unsigned bits;
};

// A row of the input, as it is read; not for pooling.
template <class T, bool kVector, Gate kGate>
__device__ __forceinline__ Row<T> read_row(const NormGrad<T>& op, int64_t r, int64_t c, int lanes) {
  Row<T> row;
  row.grad = load<kVector>(op.grad + r * op.channels + c, lanes);
  row.x = load<kVector>(op.x + r * op.channels + c, lanes);
  if constexpr (kGate == Gate::kBits) row.bits = op.mask[r * mask_bytes(op.channels) + c / kOctet];
  return row;
}

// The gradient that passes the activation.
template <Gate kGate, class T, bool kVector>
__device__ __forceinline__ Octet<T> gated(const Row<T>& row,
                                          const AffineOctet<T, kVector>& affine) {
  Octet<T> g = row.grad;
  if constexpr (kGate == Gate::kOpen) return g;
#pragma unroll
  for (int k = 0; k < kOctet; ++k) {
    bool keep;
    if constexpr (kGate == Gate::kBits) {
      keep = row.bits >> k & 1;
    } else {
      keep = !(static_cast<float>(static_cast<T>(affine(row.x.lane[k], k))) <= 0);
    }
    if (!keep) g.lane[k] = static_cast<T>(0.f);
  }
  return g;
}

// What a pooled row needs of its window: of each only the element that won passes a gradient.
template <class T, bool kVector>
__device__ __forceinline__ Row<T> read_window(const NormGrad<T>& op, int64_t r, int64_t c,
                                              int lanes) {
  Row<T> row;
  row.grad = load<kVector>(op.grad + r * op.channels + c, lanes);
  const Octet<uint8_t> code = load<kVector>(op.mask + r * op.channels + c, lanes);
  const Window window(op.height, op.width, r);
  Octet<T> pixel[4];
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    pixel[p] = load<kVector>(op.x + window.pixel(p) * op.channels + c, lanes);
  }
#pragma unroll
  for (int k = 0; k < kOctet; ++k) {
    row.x.lane[k] = pixel[0].lane[k];
#pragma unroll
    for (int p = 1; p < 4; ++p) {
      if (code.lane[k] == p) row.x.lane[k] = pixel[p].lane[k];
    }
    if (code.lane[k] == kNothingPositive) row.grad.lane[k] = static_cast<T>(0.f);
  }
  return row;
}

template <class T, bool kVector, Gate kGate>
__global__ void __launch_bounds__(kThreads, kSumBlocksAnSM / 2)
    grad_sums_kernel(NormGrad<T> op, const float* __restrict__ mean, double* __restrict__ partial) {
  const AffineOctet<T, kVector> affine(op.affine, op.channels);
  const AffineOctet<T, kVector> means(Affine{nullptr, mean}, op.channels);
  float sum[kOctet] = {}, sum_xmu[kOctet] = {};
  const auto fetch = [&](int64_t r, int64_t c, int lanes) {
    if constexpr (kGate == Gate::kCodes) {
      return read_window<T, kVector>(op, r, c, lanes);
    } else {
      return read_row<T, kVector, kGate>(op, r, c, lanes);
    }
  };
  const auto add = [&](int64_t, int64_t, int, const Row<T>& row) {
    Octet<T> g = row.grad;
    if constexpr (kGate != Gate::kCodes) g = gated<kGate>(row, affine);
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      const float gradient = static_cast<float>(g.lane[k]);
      const float deviation = static_cast<float>(row.x.lane[k]) - means.shift.lane[k];
      sum[k] += gradient;
      sum_xmu[k] = fmaf(gradient, deviation, sum_xmu[k]);
    }
  };
  constexpr int kBatch = kGate == Gate::kCodes ? 2 : kRowsAtOnce<T, true>;
  for_octets<kVector ? kBatch : 1>(op.rows, op.channels, fetch, add);
  double total[kOctet];
#pragma unroll
  for (int k = 0; k < kOctet; ++k) total[k] = sum[k];
  leave_partial(total, op.channels, partial);
#pragma unroll
  for (int k = 0; k < kOctet; ++k) total[k] = sum_xmu[k];
  leave_partial(total, op.channels, partial + gridDim.y * op.channels);
}

template <class T, bool kVector, Gate kGate>
__global__ void __launch_bounds__(kThreads)
    grad_input_kernel(NormGrad<T> op, const float* __restrict__ a, const float* __restrict__ b,
                      const float* __restrict__ c0, T* __restrict__ grad_input,
                      T* __restrict__ grad_residual) {
  const AffineOctet<T, kVector> affine(op.affine, op.channels);
  const AffineOctet<T, kVector> bx_c(Affine{b, c0}, op.channels);
  const AffineOctet<T, kVector> as(Affine{nullptr, a}, op.channels);
  const auto put = [&](int64_t pixel, int64_t c, int lanes, const Octet<T>& x, const Octet<T>& g) {
    Octet<T> result;
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      result.lane[k] =
          static_cast<T>(fmaf(static_cast<float>(g.lane[k]), as.shift.lane[k], bx_c(x.lane[k], k)));
    }
    store<kVector>(grad_input + pixel * op.channels + c, result, lanes);
  };
  if constexpr (kGate == Gate::kCodes) {
    const auto fetch = [&](int64_t r, int64_t c, int lanes) {
      return Pooled<T>{load<kVector>(op.grad + r * op.channels + c, lanes),
                       load<kVector>(op.mask + r * op.channels + c, lanes)};
    };
    const auto put_window = [&](int64_t r, int64_t c, int lanes, const Pooled<T>& read) {
      const auto put_pixel = [&](int64_t pixel, int position) {
        Octet<T> passed;
#pragma unroll
        for (int k = 0; k < kOctet; ++k) {
          passed.lane[k] = read.code.lane[k] == position ? read.grad.lane[k] : static_cast<T>(0.f);
        }
        put(pixel, c, lanes, load<kVector>(op.x + pixel * op.channels + c, lanes), passed);
      };
      Window(op.height, op.width, r).for_pixels(put_pixel);
    };
    for_octets<1>(op.rows, op.channels, fetch, put_window);
  } else {
    const auto fetch = [&](int64_t r, int64_t c, int lanes) {
      return read_row<T, kVector, kGate>(op, r, c, lanes);
    };
    const auto put_row = [&](int64_t r, int64_t c, int lanes, const Row<T>& row) {
      const Octet<T> g = gated<kGate>(row, affine);
      if (grad_residual) store<kVector>(grad_residual + r * op.channels + c, g, lanes);
      put(r, c, lanes, row.x, g);
    };
    for_octets<kVector ? 2 : 1>(op.rows, op.channels, fetch, put_row);
  }
}

// run(kernel's gate) as the operation asks for it.
template <class T, class Run>
void with_gate(const NormGrad<T>& op, Run run) {
  if (op.pooled) {
    run(std::integral_constant<Gate, Gate::kCodes>{});
  } else if (!op.relu) {
    run(std::integral_constant<Gate, Gate::kOpen>{});
  } else if (op.mask) {
    run(std::integral_constant<Gate, Gate::kBits>{});
  } else {
    run(std::integral_constant<Gate, Gate::kValues>{});
  }
}

__global__ void scale_shift_kernel(const float* mean, const float* var, NormAffine affine,
                                   int64_t channels) {
  const int64_t c = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c < channels) store_affine(c, mean[c], var[c], affine);
}

constexpr int kChannelThreads = 128;

dim3 channel_grid(int64_t channels) {
  return dim3((channels + kChannelThreads - 1) / kChannelThreads);
}

}  // namespace

int64_t norm_partial_sums(int64_t rows, int64_t channels) {
  return 2 * partial_sums(rows, channels);
}

template <class T>
void norm_stats(const T* input, double* partial, const NormStats& out, int64_t rows,
                int64_t channels, cudaStream_t stream) {
  const Cover c = sum_cover(rows, channels);
  with_vector(
      [&](auto vector) {
        launch(moments_kernel<T, vector.value>, c.grid, c.block, stream, input, partial, rows,
               channels);
      },
      channels, input);
  const StoreStats store = {static_cast<double>(rows), out};
  add_partials<2>(partial, c.grid.y, channels, store, stream);
}

template <class T>
void norm_grad_coefficients(const NormGrad<T>& op, const float* mean, const float* invstd,
                            const float* weight, double count, double* partial,
                            const NormCoefficients& out, cudaStream_t stream) {
  const Cover c = sum_cover(op.rows, op.channels);
  with_vector(
      [&](auto vector) {
        with_gate(op, [&](auto gate) {
          launch(grad_sums_kernel<T, vector.value, gate.value>, c.grid, c.block, stream, op, mean,
                 partial);
        });
      },
      op.channels, op.grad, op.x, op.pooled ? op.mask : nullptr, op.affine.scale, op.affine.shift,
      mean);
  add_partials<2>(partial, c.grid.y, op.channels,
                  StoreCoefficients{count, mean, invstd, weight, out}, stream);
}

template <class T>
void norm_grad_input(const NormGrad<T>& op, const float* a, const float* b, const float* c0,
                     T* grad_input, T* grad_residual, cudaStream_t stream) {
  const Cover c = cover(op.rows, op.channels, 1, kMaxBlocks);
  with_vector(
      [&](auto vector) {
        with_gate(op, [&](auto gate) {
          launch(grad_input_kernel<T, vector.value, gate.value>, c.grid, c.block, stream, op, a, b,
                 c0, grad_input, grad_residual);
        });
      },
      op.channels, op.grad, op.x, op.pooled ? op.mask : nullptr, op.affine.scale, op.affine.shift,
      a, b, c0, grad_input, grad_residual);
}

void norm_scale_shift(const float* mean, const float* var, const NormAffine& affine,
                      int64_t channels, cudaStream_t stream) {
  launch(scale_shift_kernel, channel_grid(channels), dim3(kChannelThreads), stream, mean, var,
         affine, channels);
}

#define WUS_INSTANTIATE(T)                                                                        \
  template void norm_stats(const T*, double*, const NormStats&, int64_t, int64_t, cudaStream_t);  \
  template void norm_grad_coefficients(const NormGrad<T>&, const float*, const float*,            \
                                       const float*, double, double*, const NormCoefficients&,    \
                                       cudaStream_t);                                             \
  template void norm_grad_input(const NormGrad<T>&, const float*, const float*, const float*, T*, \
                                T*, cudaStream_t);

WUS_INSTANTIATE(float)
WUS_INSTANTIATE(c10::Half)
WUS_INSTANTIATE(c10::BFloat16)
#undef WUS_INSTANTIATE

}  // namespace wus::cuda
