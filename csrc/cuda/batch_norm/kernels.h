// Training-mode batch norm over dense rows [rows, channels] of float, c10::Half or c10::BFloat16,
// none empty, with the ReLU and the 2x2 max-pool that may follow it. What is kept for each channel
// is float, sums over rows are double at the end. partial: norm_partial_sums(rows, channels)
// doubles.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "cuda/elementwise/mask_kernels.h"

namespace wus::cuda {

int64_t norm_partial_sums(int64_t rows, int64_t channels);

// What normalises: scale * x + shift, with 1 / the standard deviation. Null pointers stand for a
// weight of 1 and a bias of 0.
struct NormAffine {
  const float *weight, *bias;
  double eps;
  float *scale, *shift, *invstd;
};

// Of a batch. Null pointers: not wanted.
struct NormStats {
  float *mean, *var;
  NormAffine affine;
  const float* offset;  // what the rows are short of: a bias
  float *running_mean, *running_var;
  double momentum;
};

template <class T>
void norm_stats(const T* input, double* partial, const NormStats& out, int64_t rows,
                int64_t channels, cudaStream_t stream);

template <class T>
struct NormGrad {
  const T* grad;  // of the output
  const T* x;
  const uint8_t* mask;  // bits, or codes if pooled; may be null
  Affine affine;        // where ReLU passes, without a mask
  int64_t height, width;
  int64_t rows, channels;  // of grad
  bool relu, pooled;
};

struct NormCoefficients {
  float *a, *b, *c0, *grad_bias, *grad_weight;
};

// The gradient of x as a * g + b * x + c0, with g the gradient that passes the activation, and
// those of weight and bias. count: rows of x.
template <class T>
void norm_grad_coefficients(const NormGrad<T>& op, const float* mean, const float* invstd,
                            const float* weight, double count, double* partial,
                            const NormCoefficients& out, cudaStream_t stream);

// grad_input = a * g + b * x + c0; grad_residual = g unless it is null.
template <class T>
void norm_grad_input(const NormGrad<T>& op, const float* a, const float* b, const float* c0,
                     T* grad_input, T* grad_residual, cudaStream_t stream);

void norm_scale_shift(const float* mean, const float* var, const NormAffine& affine,
                      int64_t channels, cudaStream_t stream);

}  // namespace wus::cuda
