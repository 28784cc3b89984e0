// Dropout that keeps one bit an element. Dense rows as in mask_kernels.h.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

namespace wus::cuda {

// Where a call's random numbers begin: values, or (while a CUDA graph is captured) where the replay
// will find them.
struct RandomState {
  uint64_t seed, offset;
  const int64_t* seed_at;  // null: the values count
  const int64_t* offset_at;
};

// Numbers that a call draws from each element's stream; a multiple of 4, as torch counts.
constexpr uint64_t kDrawsAnOctet = 8;

// output = input (or its ReLU) * scale where an element is kept, which happens when a random
// number below 2^32 is below keep_below, and * 0 elsewhere.
template <class T>
void dropout(const T* input, RandomState random, uint64_t keep_below, float scale, bool relu,
             T* output, uint8_t* mask, int64_t rows, int64_t channels, cudaStream_t stream);

}  // namespace wus::cuda
