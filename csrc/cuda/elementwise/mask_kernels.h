// ReLU with one bit an element, and what backward does with those bits. Dense rows [rows, channels]
// of float, c10::Half or c10::BFloat16, masks [rows, ceil(channels / 8)], neither empty; sums in
// float.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

namespace wus::cuda {

// scale * x + shift of each channel. scale may be null for 1, both for x as it is.
struct Affine {
  const float* scale = nullptr;
  const float* shift = nullptr;
};

// output = affine(input) + other, or its ReLU. other and mask may be null; output may be input.
template <class T>
void relu(const T* input, Affine affine, const T* other, bool relu, T* output, uint8_t* mask,
          int64_t rows, int64_t channels, cudaStream_t stream);

// output = grad * scale where the mask is set, 0 elsewhere.
template <class T>
void apply_mask(const T* grad, const uint8_t* mask, float scale, T* output, int64_t rows,
                int64_t channels, cudaStream_t stream);

// grad_bias = the sum over rows of the masked gradient, which is stored unless grad_input is null.
// mask may be null for all of it. partial has partial_sums(rows, channels) elements.
template <class T>
void mask_bias_grad(const T* grad, const uint8_t* mask, T* grad_input, float* partial,
                    float* grad_bias, int64_t rows, int64_t channels, cudaStream_t stream);

int64_t partial_sums(int64_t rows, int64_t channels);

}  // namespace wus::cuda
