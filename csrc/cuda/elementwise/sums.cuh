// Sums over rows in two stages without atomics: blocks leave partial sums, and a second kernel adds
// those. Every addition's place is fixed by the shape, so that results repeat bit for bit.
#pragma once

#include "cuda/elementwise/grid.cuh"
#include "cuda/elementwise/octets.cuh"

namespace wus::cuda {

constexpr int kRowsAThread = 8;
constexpr int kMaxSumBlocks = 512;
constexpr int kSumBlocksAnSM = 4;  // at least: 64 registers, enough to load four rows at once

inline Cover sum_cover(int64_t rows, int64_t channels) {
  return cover(rows, channels, kRowsAThread, kMaxSumBlocks);
}

// partial[blockIdx.y][c] = the sums of the block's threads, added as a tree. Every thread calls it.
template <class Sum>
__device__ __forceinline__ void leave_partial(const Sum (&sum)[kOctet], int64_t channels,
                                              Sum* partial) {
  __shared__ Sum shared[kOctet][kThreads];
  const int at = threadIdx.y * blockDim.x + threadIdx.x;
  __syncthreads();  // a call before may still be reading
#pragma unroll
  for (int k = 0; k < kOctet; ++k) shared[k][at] = sum[k];
  for (unsigned half = blockDim.y / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) {
#pragma unroll
      for (int k = 0; k < kOctet; ++k) shared[k][at] += shared[k][at + half * blockDim.x];
    }
  }
  if (threadIdx.y > 0) return;
  const int64_t c = first_channel();
#pragma unroll
  for (int k = 0; k < kOctet; ++k) {
    if (c + k < channels) partial[blockIdx.y * channels + c + k] = shared[k][at];
  }
}

constexpr int kWarp = 32;

// finish(c, sums) with the totals of channel c; partial is [kSums, blocks, channels].
template <int kSums, class Sum, class Finish>
__global__ void __launch_bounds__(kWarp* kWarp)
    add_partials_kernel(const Sum* __restrict__ partial, int64_t blocks, int64_t channels,
                        Finish finish) {
  __shared__ Sum shared[kSums][kWarp][kWarp];
  const int64_t c = int64_t{blockIdx.x} * kWarp + threadIdx.x;
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    Sum sum = 0;
    if (c < channels) {
#pragma unroll 4
      for (int64_t b = threadIdx.y; b < blocks; b += kWarp) {
        sum += partial[(k * blocks + b) * channels + c];
      }
    }
    shared[k][threadIdx.y][threadIdx.x] = sum;
  }
  for (unsigned half = kWarp / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) {
#pragma unroll
      for (int k = 0; k < kSums; ++k) {
        shared[k][threadIdx.y][threadIdx.x] += shared[k][threadIdx.y + half][threadIdx.x];
      }
    }
  }
  if (threadIdx.y > 0 || c >= channels) return;
  Sum totals[kSums];
#pragma unroll
  for (int k = 0; k < kSums; ++k) totals[k] = shared[k][0][threadIdx.x];
  finish(c, totals);
}

template <int kSums, class Sum, class Finish>
void add_partials(const Sum* partial, int64_t blocks, int64_t channels, Finish finish,
                  cudaStream_t stream) {
  const dim3 grid((channels + kWarp - 1) / kWarp);
  launch(add_partials_kernel<kSums, Sum, Finish>, grid, dim3(kWarp, kWarp), stream, partial, blocks,
         channels, finish);
}

template <class Sum>
struct StoreSum {
  Sum* total;

  __device__ void operator()(int64_t c, const Sum (&sums)[1]) const { total[c] = sums[0]; }
};

}  // namespace wus::cuda
