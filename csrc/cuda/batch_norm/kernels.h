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

template <class T>
void norm_stats(const T* input, double* partial, float* mean, float* var, int64_t rows,
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

// With g the gradient that passes the activation: the sums of g and of g * (x - mean).
template <class T>
void norm_grad_sums(const NormGrad<T>& op, const float* mean, double* partial, double* sum_grad,
                    double* sum_grad_xmu, cudaStream_t stream);

// grad_input = a * g + b * x + c0; grad_residual = g unless it is null.
template <class T>
void norm_grad_input(const NormGrad<T>& op, const float* a, const float* b, const float* c0,
                     T* grad_input, T* grad_residual, cudaStream_t stream);

// Of each channel: null pointers stand for a weight of 1 and a bias of 0.
void norm_scale_shift(const float* mean, const float* var, const float* weight, const float* bias,
                      double eps, float* scale, float* shift, float* invstd, int64_t channels,
                      cudaStream_t stream);
void norm_update_running(float* running_mean, float* running_var, const float* mean,
                         const float* var, double momentum, double unbiased, int64_t channels,
                         cudaStream_t stream);
struct NormCoefficients {
  float *a, *b, *c0, *grad_bias, *grad_weight;
};
void norm_grad_coefficients(const double* sum_grad, const double* sum_grad_xmu, const float* mean,
                            const float* invstd, const float* weight, double count,
                            NormCoefficients out, int64_t channels, cudaStream_t stream);

}  // namespace wus::cuda
