#include "cuda/elementwise/mask_kernels.h"

#include "common/layout.h"
#include "cuda/elementwise/sums.cuh"

namespace wus::cuda {
namespace {

constexpr int kBlocksAnSM = 4;  // at least, of what sums nothing

template <class T>
struct Pair {
  Octet<T> first, second;
};

template <class T>
struct Masked {
  Octet<T> octet;
  unsigned bits;
};

// input and output may be the same memory, so neither is __restrict__.
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads, kBlocksAnSM)
    relu_kernel(const T* input, Affine affine, const T* __restrict__ other, bool relu, T* output,
                uint8_t* __restrict__ mask, int64_t rows, int64_t channels) {
  const int64_t bytes = mask_bytes(channels);
  const AffineOctet<T, kVector> scaled(affine, channels);
  const auto fetch = [=](int64_t r, int64_t c, int lanes) {
    Pair<T> read;
    read.first = load<kVector>(input + r * channels + c, lanes);
    if (other) read.second = load<kVector>(other + r * channels + c, lanes);
    return read;
  };
  for_octets<std::max(1, kRowsAtOnce<T, kVector> / 2)>(
      rows, channels, fetch, [=](int64_t r, int64_t c, int lanes, const Pair<T>& read) {
        Octet<T> x = read.first;
        unsigned bits = 0;
#pragma unroll
        for (int k = 0; k < kOctet; ++k) {
          float y = scaled(x.lane[k], k);
          if (other) y += static_cast<float>(read.second.lane[k]);
          x.lane[k] = static_cast<T>(y);
          if (!relu) continue;
          const bool keep = !(static_cast<float>(x.lane[k]) <= 0);  // keeps NaN
          if (!keep) x.lane[k] = static_cast<T>(0.f);
          bits |= (keep ? 1u : 0u) << k;
        }
        store<kVector>(output + r * channels + c, x, lanes);
        if (mask) mask[r * bytes + c / kOctet] = static_cast<uint8_t>(bits);
      });
}

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads, kBlocksAnSM)
    apply_mask_kernel(const T* __restrict__ grad, const uint8_t* __restrict__ mask, float scale,
                      T* __restrict__ output, int64_t rows, int64_t channels) {
  const int64_t bytes = mask_bytes(channels);
  const auto fetch = [=](int64_t r, int64_t c, int lanes) {
    return Masked<T>{load<kVector>(grad + r * channels + c, lanes), mask[r * bytes + c / kOctet]};
  };
  for_octets<std::max(1, kRowsAtOnce<T, kVector> / 2)>(
      rows, channels, fetch, [=](int64_t r, int64_t c, int lanes, Masked<T> read) {
#pragma unroll
        for (int k = 0; k < kOctet; ++k) {
          const float scaled = static_cast<float>(read.octet.lane[k]) * scale;
          read.octet.lane[k] = static_cast<T>(read.bits >> k & 1 ? scaled : 0.f);
        }
        store<kVector>(output + r * channels + c, read.octet, lanes);
      });
}

template <class T, bool kVector, bool kMasked, bool kStore>
__global__ void __launch_bounds__(kThreads, kSumBlocksAnSM)
    mask_bias_grad_kernel(const T* __restrict__ grad, const uint8_t* __restrict__ mask,
                          T* __restrict__ grad_input, float* __restrict__ partial, int64_t rows,
                          int64_t channels) {
  const int64_t bytes = mask_bytes(channels);
  float sum[kOctet] = {};
  const auto fetch = [=](int64_t r, int64_t c, int lanes) {
    return Masked<T>{load<kVector>(grad + r * channels + c, lanes),
                     kMasked ? mask[r * bytes + c / kOctet] : 0xffu};
  };
  const auto add = [=, &sum](int64_t r, int64_t c, int lanes, Masked<T> read) {
    Octet<T>& g = read.octet;
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      if (!(read.bits >> k & 1)) g.lane[k] = static_cast<T>(0.f);
      sum[k] += static_cast<float>(g.lane[k]);
    }
    if constexpr (kStore) store<kVector>(grad_input + r * channels + c, g, lanes);
  };
  for_octets<kRowsAtOnce<T, kVector>>(rows, channels, fetch, add);
  leave_partial(sum, channels, partial);
}

}  // namespace

template <class T>
void relu(const T* input, Affine affine, const T* other, bool relu, T* output, uint8_t* mask,
          int64_t rows, int64_t channels, cudaStream_t stream) {
  const Cover c = cover(rows, channels, 1, kMaxBlocks);
  with_vector(
      [&](auto vector) {
        launch(relu_kernel<T, vector.value>, c.grid, c.block, stream, input, affine, other, relu,
               output, mask, rows, channels);
      },
      channels, input, affine.scale, affine.shift, other, output);
}

template <class T>
void apply_mask(const T* grad, const uint8_t* mask, float scale, T* output, int64_t rows,
                int64_t channels, cudaStream_t stream) {
  const Cover c = cover(rows, channels, 1, kMaxBlocks);
  with_vector(
      [&](auto vector) {
        launch(apply_mask_kernel<T, vector.value>, c.grid, c.block, stream, grad, mask, scale,
               output, rows, channels);
      },
      channels, grad, output);
}

template <class T>
void mask_bias_grad(const T* grad, const uint8_t* mask, T* grad_input, float* partial,
                    float* grad_bias, int64_t rows, int64_t channels, cudaStream_t stream) {
  const Cover c = sum_cover(rows, channels);
  with_vector(
      [&](auto vector) {
        auto kernel = mask_bias_grad_kernel<T, vector.value, false, false>;
        if (mask) kernel = mask_bias_grad_kernel<T, vector.value, true, false>;
        if (mask && grad_input) kernel = mask_bias_grad_kernel<T, vector.value, true, true>;
        launch(kernel, c.grid, c.block, stream, grad, mask, grad_input, partial, rows, channels);
      },
      channels, grad, grad_input);
  add_partials<1>(partial, c.grid.y, channels, StoreSum<float>{grad_bias}, stream);
}

int64_t partial_sums(int64_t rows, int64_t channels) {
  return int64_t{sum_cover(rows, channels).grid.y} * channels;
}

#define WUS_INSTANTIATE(T)                                                                       \
  template void relu(const T*, Affine, const T*, bool, T*, uint8_t*, int64_t, int64_t,           \
                     cudaStream_t);                                                              \
  template void apply_mask(const T*, const uint8_t*, float, T*, int64_t, int64_t, cudaStream_t); \
  template void mask_bias_grad(const T*, const uint8_t*, T*, float*, float*, int64_t, int64_t,   \
                               cudaStream_t);

WUS_INSTANTIATE(float)
WUS_INSTANTIATE(c10::Half)
WUS_INSTANTIATE(c10::BFloat16)
#undef WUS_INSTANTIATE

}  // namespace wus::cuda
