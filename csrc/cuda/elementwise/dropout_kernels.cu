#include "cuda/elementwise/dropout_kernels.h"

#include "common/philox.h"
#include "cuda/elementwise/grid.cuh"
#include "cuda/elementwise/octets.cuh"

namespace wus::cuda {
namespace {

// An octet's numbers depend on its place and the state alone, not on the launch.
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    dropout_kernel(const T* __restrict__ input, RandomState random, uint64_t keep_below,
                   float scale, bool relu, T* __restrict__ output, uint8_t* __restrict__ mask,
                   int64_t rows, int64_t channels) {
  const int64_t bytes = mask_bytes(channels);
  const uint64_t seed = random.seed_at ? static_cast<uint64_t>(*random.seed_at) : random.seed;
  const uint64_t offset =
      random.offset + (random.offset_at ? static_cast<uint64_t>(*random.offset_at) : 0);
  const auto fetch = [=](int64_t r, int64_t c, int lanes) {
    return load<kVector>(input + r * channels + c, lanes);
  };
  for_octets<1>(rows, channels, fetch, [=](int64_t r, int64_t c, int lanes, Octet<T> x) {
    const int64_t octet = r * bytes + c / kOctet;
    unsigned bits = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Random4 numbers = philox(seed, offset / 4 + half, static_cast<uint64_t>(octet));
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int k = 4 * half + w;
        const float value = static_cast<float>(x.lane[k]);
        const bool chosen = numbers.word[w] < keep_below;
        const bool positive = !relu || !(value <= 0);  // keeps NaN
        // A product, not a select: a dropped infinity or NaN is NaN, as stock dropout has it.
        x.lane[k] = static_cast<T>((positive ? value : 0.f) * (chosen ? scale : 0.f));
        bits |= (chosen && positive && k < lanes ? 1u : 0u) << k;
      }
    }
    store<kVector>(output + r * channels + c, x, lanes);
    mask[octet] = static_cast<uint8_t>(bits);
  });
}

}  // namespace

template <class T>
void dropout(const T* input, RandomState random, uint64_t keep_below, float scale, bool relu,
             T* output, uint8_t* mask, int64_t rows, int64_t channels, cudaStream_t stream) {
  const Cover c = cover(rows, channels, 1, kMaxBlocks);
  with_vector(
      [&](auto vector) {
        launch(dropout_kernel<T, vector.value>, c.grid, c.block, stream, input, random, keep_below,
               scale, relu, output, mask, rows, channels);
      },
      channels, input, output);
}

#define WUS_INSTANTIATE(T)                                                                   \
  template void dropout(const T*, RandomState, uint64_t, float, bool, T*, uint8_t*, int64_t, \
                        int64_t, cudaStream_t);

WUS_INSTANTIATE(float)
WUS_INSTANTIATE(c10::Half)
WUS_INSTANTIATE(c10::BFloat16)
#undef WUS_INSTANTIATE

}  // namespace wus::cuda
