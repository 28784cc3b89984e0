// 2x2 max-pool of stride 2, with or without ReLU, that keeps one byte a pooled element (layout.h).
// NHWC tensors of float, c10::Half or c10::BFloat16 whose pooled form has `rows` pixels, none
// empty; height and width are the input's.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "cuda/elementwise/mask_kernels.h"

namespace wus::cuda {

// Pools affine(input), rounded to T.
template <class T>
void relu_max_pool(const T* input, Affine affine, int64_t height, int64_t width, bool relu,
                   T* output, uint8_t* code, int64_t rows, int64_t channels, cudaStream_t stream);

// grad_bias = the sum of the gradient that passes; unless grad_input is null, all of it is written.
// partial has partial_sums(rows, channels) elements (mask_kernels.h).
template <class T>
void max_pool_bias_grad(const T* grad, const uint8_t* code, int64_t height, int64_t width,
                        T* grad_input, float* partial, float* grad_bias, int64_t rows,
                        int64_t channels, cudaStream_t stream);

}  // namespace wus::cuda
