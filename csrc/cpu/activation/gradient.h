// The gradient that passes an activation and a normalisation, as operators are handed it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "cpu/activation/kernels.h"

namespace wus::cpu {

void check_act(int64_t act);

// A dense vector with one element a channel, or undefined.
at::Tensor per_channel(const at::Tensor& t, const char* name, int64_t channels,
                       at::ScalarType type = at::kFloat);
at::Tensor per_channel(const std::optional<at::Tensor>& t, const char* name, int64_t channels);

// Checked and dense, of elements T; `op` points into the tensors that it holds.
template <class T>
class PassedGradient {
 public:
  // mask: bits. x, named `x_name` in errors: input of the normalisation if there are scale and
  // shift, else of the activation; needed without a mask.
  PassedGradient(const at::Tensor& grad_output, const std::optional<at::Tensor>& mask,
                 const std::optional<at::Tensor>& x, const char* x_name, const at::Tensor& scale,
                 const at::Tensor& shift, int64_t act, double slope);
  // norm: rows [3, channels] = a, b, c of the normalisation of z, through which the gradient goes
  // on, or [5, channels] with scale and shift.
  PassedGradient(const at::Tensor& grad_output, const std::optional<at::Tensor>& mask,
                 const std::optional<at::Tensor>& z, const std::optional<at::Tensor>& norm,
                 int64_t act, double slope);

  const NormCoefficients* norm() const { return rows_.defined() ? &coefficients_ : nullptr; }
  // What passes the activation, summed over rows: float32 [channels].
  at::Tensor sum() const;

  at::Tensor grad;
  int64_t rows;
  ActivationGrad<T> op{};

 private:
  at::Tensor mask_, x_, scale_, shift_, rows_;
  NormCoefficients coefficients_{};
};

}  // namespace wus::cpu
