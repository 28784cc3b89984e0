#include "cuda/elementwise/pool_kernels.h"

#include "common/layout.h"
#include "cuda/elementwise/sums.cuh"

namespace wus::cuda {
namespace {

template <class T>
struct Pixels {
  Octet<T> at[4];
};

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    relu_max_pool_kernel(const T* __restrict__ input, Affine affine, int64_t height, int64_t width,
                         bool relu, T* __restrict__ output, uint8_t* __restrict__ code,
                         int64_t rows, int64_t channels) {
  const AffineOctet<T, kVector> scaled(affine, channels);
  // What is compared is what stock would have stored before: ties are ties of rounded values.
  const auto value = [&scaled](T x, int k) {
    return static_cast<float>(static_cast<T>(scaled(x, k)));
  };
  const auto fetch = [=](int64_t r, int64_t c, int lanes) {
    const Window window(height, width, r);
    Pixels<T> x;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      x.at[p] = load<kVector>(input + window.pixel(p) * channels + c, lanes);
    }
    return x;
  };
  for_octets<1>(rows, channels, fetch, [=](int64_t r, int64_t c, int lanes, const Pixels<T>& x) {
    Octet<T> largest;
    Octet<uint8_t> where;
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      // The first of equals, and the last NaN, as torch has it.
      float best = value(x.at[0].lane[k], k);
      int position = 0;
#pragma unroll
      for (int p = 1; p < 4; ++p) {
        const float next = value(x.at[p].lane[k], k);
        if (next > best || next != next) {
          best = next;
          position = p;
        }
      }
      if (relu && best <= 0) {
        best = 0;
        position = kNothingPositive;
      }
      largest.lane[k] = static_cast<T>(best);
      where.lane[k] = static_cast<uint8_t>(position);
    }
    store<kVector>(output + r * channels + c, largest, lanes);
    store<kVector>(code + r * channels + c, where, lanes);
  });
}

template <class T, bool kVector, bool kStore>
__global__ void __launch_bounds__(kThreads, kSumBlocksAnSM / 2)
    max_pool_bias_grad_kernel(const T* __restrict__ grad, const uint8_t* __restrict__ code,
                              int64_t height, int64_t width, T* __restrict__ grad_input,
                              float* __restrict__ partial, int64_t rows, int64_t channels) {
  float sum[kOctet] = {};
  const auto fetch = [=](int64_t r, int64_t c, int lanes) {
    return Pooled<T>{load<kVector>(grad + r * channels + c, lanes),
                     load<kVector>(code + r * channels + c, lanes)};
  };
  const auto add = [=, &sum](int64_t r, int64_t c, int lanes, const Pooled<T>& read) {
    const auto& [g, where] = read;
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      if (where.lane[k] != kNothingPositive) sum[k] += static_cast<float>(g.lane[k]);
    }
    if constexpr (kStore) {
      const auto put = [&](int64_t pixel, int position) {
        Octet<T> passed;
#pragma unroll
        for (int k = 0; k < kOctet; ++k) {
          passed.lane[k] = where.lane[k] == position ? g.lane[k] : static_cast<T>(0.f);
        }
        store<kVector>(grad_input + pixel * channels + c, passed, lanes);
      };
      Window(height, width, r).for_pixels(put);
    }
  };
  for_octets<kVector ? 2 : 1>(rows, channels, fetch, add);
  leave_partial(sum, channels, partial);
}

}  // namespace

template <class T>
void relu_max_pool(const T* input, Affine affine, int64_t height, int64_t width, bool relu,
                   T* output, uint8_t* code, int64_t rows, int64_t channels, cudaStream_t stream) {
  const Cover c = cover(rows, channels, 1, kMaxBlocks);
  with_vector(
      [&](auto vector) {
        launch(relu_max_pool_kernel<T, vector.value>, c.grid, c.block, stream, input, affine,
               height, width, relu, output, code, rows, channels);
      },
      channels, input, affine.scale, affine.shift, output, code);
}

template <class T>
void max_pool_bias_grad(const T* grad, const uint8_t* code, int64_t height, int64_t width,
                        T* grad_input, float* partial, float* grad_bias, int64_t rows,
                        int64_t channels, cudaStream_t stream) {
  const Cover c = sum_cover(rows, channels);
  with_vector(
      [&](auto vector) {
        auto kernel = grad_input ? max_pool_bias_grad_kernel<T, vector.value, true>
                                 : max_pool_bias_grad_kernel<T, vector.value, false>;
        launch(kernel, c.grid, c.block, stream, grad, code, height, width, grad_input, partial,
               rows, channels);
      },
      channels, grad, grad_input, code);
  add_partials<1>(partial, c.grid.y, channels, StoreSum<float>{grad_bias}, stream);
}

#define WUS_INSTANTIATE(T)                                                                         \
  template void relu_max_pool(const T*, Affine, int64_t, int64_t, bool, T*, uint8_t*, int64_t,     \
                              int64_t, cudaStream_t);                                              \
  template void max_pool_bias_grad(const T*, const uint8_t*, int64_t, int64_t, T*, float*, float*, \
                                   int64_t, int64_t, cudaStream_t);

WUS_INSTANTIATE(float)
WUS_INSTANTIATE(c10::Half)
WUS_INSTANTIATE(c10::BFloat16)
#undef WUS_INSTANTIATE

}  // namespace wus::cuda
