#pragma once
// Batch norm with the batch's statistics.
#include "chains/kernels.h"

namespace wus::chains {

// The running statistics, if there are any, follow the batch's. weight and bias may be undefined.
struct BatchNorm {
  Tensor weight, bias, running_mean, running_var;
  double momentum, eps;
};

// What is to be normalised, as scale * z + shift, and what backward needs. Per channel, float32.
struct Normed {
  Tensor z, mean, scale, shift, invstd;
};

// offset: what z is short of: a bias, which the normalisation would take away again.
Normed normed(const Kernels& kernels, const Tensor& z, const BatchNorm& norm,
              const OptionalTensor& offset = std::nullopt);
// Of z whose mean and biased variance are known.
Normed normed(const Kernels& kernels, const Tensor& z, const Tensor& mean, const Tensor& var,
              const BatchNorm& norm);

}  // namespace wus::chains
