#pragma once
// The operators that chains are made of, without a detour through Python.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <string>
#include <tuple>

namespace wus::chains {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Of one namespace: "wus", or another whose operators have the same schemas (see ops.cpp).
struct Kernels {
  template <class F>
  using Operator = c10::TypedOperatorHandle<F>;
  using Two = std::tuple<Tensor, Tensor>;
  using Three = std::tuple<Tensor, Tensor, Tensor>;
  using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
  using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

  explicit Kernels(const std::string& space);
  // Stays for good.
  static const Kernels& of(const std::string& space);

  Operator<Two(const Tensor&, const OptionalTensor&, int64_t, double)> activate;
  Operator<Two(Tensor, int64_t, double)> activate_;
  Operator<Two(const Tensor&, const OptionalTensor&, const OptionalTensor&, int64_t, double, bool,
               bool)>
      activate_grad;
  Operator<Two(const Tensor&, bool, at::IntArrayRef)> relu_max_pool;
  Operator<Two(const Tensor&, const Tensor&, at::IntArrayRef, bool, at::IntArrayRef)>
      max_pool_bias_grad;
  Operator<Four(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                const OptionalTensor&, double, double, const OptionalTensor&)>
      train;
  Operator<Three(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                 double)>
      scale_shift;
  Operator<void(Tensor, Tensor, const Tensor&, const Tensor&, double, int64_t)> update_running;
  Operator<Two(const Tensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&, int64_t,
               double, at::IntArrayRef, bool)>
      apply;
  Operator<Five(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, int64_t,
                double, at::IntArrayRef)>
      grad_coefficients;
  Operator<Two(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
               const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, int64_t, double,
               at::IntArrayRef, bool)>
      grad_input;
};

}  // namespace wus::chains
