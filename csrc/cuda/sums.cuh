// Sums over rows in two stages without atomics: blocks leave partial sums, and a second kernel adds
// those. Every addition's place is fixed by the shape, so that results repeat bit for bit.
#pragma once

#include "grid.cuh"
#include "octets.cuh"

namespace wus::cuda {

constexpr int kRowsAThread = 8;
constexpr int kMaxSumBlocks = 1024;
constexpr int kSumBlocksAnSM = 4;  // at least: 64 registers, enough to load four rows at once

inline Cover sum_cover(int64_t rows, int64_t channels) {
  return cover(rows, channels, kRowsAThread, kMaxSumBlocks);
}

// partial[blockIdx.y][c] = the sums of the block's threads, added as a tree. Every thread calls it.
__device__ __forceinline__ void leave_partial(const float (&sum)[kOctet], int64_t channels,
                                              float* partial) {
  __shared__ float shared[kOctet][kThreads];
  const int at = threadIdx.y * blockDim.x + threadIdx.x;
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

template <class T>
__global__ void __launch_bounds__(kWarp* kWarp)
    add_partials_kernel(const float* __restrict__ partial, int64_t blocks, int64_t channels,
                        T* __restrict__ total) {
  __shared__ float shared[kWarp][kWarp];
  const int64_t c = int64_t{blockIdx.x} * kWarp + threadIdx.x;
  float sum = 0;
  if (c < channels) {
#pragma unroll 4
    for (int64_t b = threadIdx.y; b < blocks; b += kWarp) sum += partial[b * channels + c];
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  for (unsigned half = kWarp / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) {
      shared[threadIdx.y][threadIdx.x] += shared[threadIdx.y + half][threadIdx.x];
    }
  }
  if (threadIdx.y == 0 && c < channels) total[c] = static_cast<T>(shared[0][threadIdx.x]);
}

template <class T>
void add_partials(const float* partial, int64_t blocks, int64_t channels, T* total,
                  cudaStream_t stream) {
  const dim3 grid((channels + kWarp - 1) / kWarp);
  launch(add_partials_kernel<T>, grid, dim3(kWarp, kWarp), stream, partial, blocks, channels,
         total);
}

}  // namespace wus::cuda
