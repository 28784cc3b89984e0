// How threads cover rows x channels: a thread takes an octet, eight channels (16 bytes of halves,
// 32 of floats, one byte of mask), and strides over rows, so that no index is ever divided.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <stdint.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cuda/elementwise/mask_kernels.h"

namespace wus::cuda {

constexpr int kOctet = 8;
constexpr int kThreads = 256;
constexpr int kOctetsAbreast = 32;  // at most, in a block: 512 bytes of halves
constexpr int kMaxBlocks = 1056;    // of kernels that sum nothing

struct Cover {
  dim3 grid, block;
};

// Blocks of kThreads: x counts octets, y rows. Follows from the shape alone, never from the device,
// so that sums are the same bits everywhere. rows_a_thread: the fewest that are worth a thread.
inline Cover cover(int64_t rows, int64_t channels, int64_t rows_a_thread, int64_t max_blocks) {
  const int64_t octets = (channels + kOctet - 1) / kOctet;
  int64_t x = 1;
  while (x < octets && x < kOctetsAbreast) x *= 2;
  const int64_t y = kThreads / x;
  const int64_t columns = (octets + x - 1) / x;
  const int64_t wanted = (rows + y * rows_a_thread - 1) / (y * rows_a_thread);
  const int64_t lines = std::max<int64_t>(1, std::min(wanted, max_blocks / columns));
  return {dim3(columns, lines), dim3(x, y)};
}

__device__ __forceinline__ int64_t first_channel() {
  return (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kOctet;
}

// body(row, channel, lanes, fetch(row, channel, lanes)): an octet at the end of a row may have
// fewer than eight lanes. What kBatch rows need is fetched before the first of them is computed, so
// that enough reads are under way at a time; a compiler moves none of them past a write or a
// branch.
template <int kBatch, class Fetch, class Body>
__device__ __forceinline__ void for_octets(int64_t rows, int64_t channels, Fetch fetch, Body body) {
  const int64_t c = first_channel();
  if (c >= channels) return;
  const int lanes = channels - c < kOctet ? static_cast<int>(channels - c) : kOctet;
  const int64_t stride = int64_t{gridDim.y} * blockDim.y;
  int64_t r = int64_t{blockIdx.y} * blockDim.y + threadIdx.y;
  for (; r + (kBatch - 1) * stride < rows; r += kBatch * stride) {
    decltype(fetch(r, c, lanes)) fetched[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) fetched[i] = fetch(r + i * stride, c, lanes);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) body(r + i * stride, c, lanes, fetched[i]);
  }
  for (; r < rows; r += stride) body(r, c, lanes, fetch(r, c, lanes));
}

template <class T>
struct alignas(sizeof(T) * kOctet < 16 ? sizeof(T) * kOctet : 16) Octet {
  T lane[kOctet];
};

// Rows to read at a time: 64 bytes a tensor, or one row where single elements are read.
template <class T, bool kVector>
constexpr int kRowsAtOnce = kVector ? 8 / static_cast<int>(sizeof(T)) : 1;

// A pooled gradient, and where it goes.
template <class T>
struct Pooled {
  Octet<T> grad;
  Octet<uint8_t> code;
};

// With kVector every octet is whole and aligned.
template <bool kVector, class T>
__device__ __forceinline__ Octet<T> load(const T* p, int lanes) {
  if constexpr (kVector) {
    return *reinterpret_cast<const Octet<T>*>(p);
  } else {
    Octet<T> octet;
#pragma unroll
    for (int k = 0; k < kOctet; ++k) octet.lane[k] = k < lanes ? p[k] : static_cast<T>(0);
    return octet;
  }
}

template <bool kVector, class T>
__device__ __forceinline__ void store(T* p, const Octet<T>& octet, int lanes) {
  if constexpr (kVector) {
    *reinterpret_cast<Octet<T>*>(p) = octet;
  } else {
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      if (k < lanes) p[k] = octet.lane[k];
    }
  }
}

// What a thread applies to its channels, loaded once. Forward and backward must decide alike where
// ReLU passes: both use this.
template <class T, bool kVector>
struct AffineOctet {
  Octet<float> scale, shift;
  bool identity;

  __device__ __forceinline__ AffineOctet(const Affine& affine, int64_t channels)
      : identity(!affine.shift) {
    const int64_t c = first_channel();
    if (identity || c >= channels) return;
    const int lanes = channels - c < kOctet ? static_cast<int>(channels - c) : kOctet;
    shift = load<kVector>(affine.shift + c, lanes);
    if (affine.scale) {
      scale = load<kVector>(affine.scale + c, lanes);
    } else {
#pragma unroll
      for (int k = 0; k < kOctet; ++k) scale.lane[k] = 1;
    }
  }

  __device__ __forceinline__ float operator()(T x, int k) const {
    const float value = static_cast<float>(x);
    return identity ? value : fmaf(value, scale.lane[k], shift.lane[k]);
  }
};

template <class T>
bool aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % alignof(Octet<T>) == 0;
}

// Calls with std::true_type where octets can be read and written whole. Null counts as aligned.
template <class Launch, class... Pointers>
void with_vector(Launch launch, int64_t channels, Pointers... pointers) {
  if (channels % kOctet == 0 && (aligned(pointers) && ...)) {
    launch(std::true_type{});
  } else {
    launch(std::false_type{});
  }
}

}  // namespace wus::cuda
