#pragma once
// Which steps a chain takes in: each gives the longer chain's tensor, or nothing where the step
// must run by itself.
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <vector>

#include "deferral/chain.h"

namespace wus::deferral {

struct NormArguments {
  std::optional<at::Tensor> weight, bias, running_mean, running_var, batches;
  bool counts;  // this batch, in `batches`, as the layer does
  bool constant, batch;
  double momentum, eps;
  pybind11::object layer = {};  // whose call may begin a chain; null: it may only join one
};

// A layer's call; `sizes` are the output's.
std::optional<at::Tensor> begin_chain(pybind11::object layer, pybind11::object plan, bool is_conv,
                                      const at::Tensor& input, const at::Tensor& weight,
                                      const std::optional<at::Tensor>& bias, bool weight_trains,
                                      std::vector<int64_t> sizes, at::ScalarType dtype);
std::optional<at::Tensor> append_norm(const at::Tensor& input, const NormArguments& norm);
std::optional<at::Tensor> append_sum(const at::Tensor& self, const at::Tensor& other,
                                     const at::Scalar& alpha, bool in_place);
std::optional<at::Tensor> append_activation(const at::Tensor& self, const Act& act, bool in_place);
std::optional<at::Tensor> append_pool(const at::Tensor& self, const Pool& pool);
// Dropout in training; draws its random numbers.
std::optional<at::Tensor> append_dropout(const at::Tensor& input, double p);

}  // namespace wus::deferral
