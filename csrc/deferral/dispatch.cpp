// What an operator does that is handed a deferred tensor: a chain takes in the few that it can, for
// every other the tensor is computed first.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/add.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/relu.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "deferral/append.h"
#include "deferral/deferred.h"
#include "deferral/session.h"

namespace wus::deferral {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

void before_use(const at::Tensor& tensor, bool written) {
  if (Deferred* deferred = as_deferred(tensor)) deferred->settle();
  Session* session = Session::current();
  if (session != nullptr && session->waits() && tensor.defined())
    session->before_use(tensor, written);
}

// Around the operator itself, behind which nothing is deferred.
using Through = c10::impl::ExcludeDispatchKeyGuard;

at::Tensor relu(const at::Tensor& self) {
  if (auto output = append_relu(self, false)) return *output;
  before_use(self, false);
  Through through(kKey);
  return at::relu(self);
}

at::Tensor& relu_(at::Tensor& self) {
  if (append_relu(self, true)) return self;
  before_use(self, true);
  Through through(kKey);
  return at::relu_(self);
}

at::Tensor add(const at::Tensor& self, const at::Tensor& other, const at::Scalar& alpha) {
  if (auto output = append_sum(self, other, alpha, false)) return *output;
  before_use(self, false);
  before_use(other, false);
  Through through(kKey);
  return at::add(self, other, alpha);
}

at::Tensor& add_(at::Tensor& self, const at::Tensor& other, const at::Scalar& alpha) {
  if (append_sum(self, other, alpha, true)) return self;
  before_use(other, false);
  before_use(self, true);
  Through through(kKey);
  return self.add_(other, alpha);
}

at::Tensor max_pool2d(const at::Tensor& self, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                      at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  const auto all = [](at::IntArrayRef values, int64_t number) {
    return std::all_of(values.begin(), values.end(), [=](int64_t v) { return v == number; });
  };
  if (all(kernel_size, 2) && all(stride, 2) && all(padding, 0) && all(dilation, 1) && !ceil_mode) {
    if (auto output = append_pool(self)) return *output;
  }
  before_use(self, false);
  Through through(kKey);
  return at::max_pool2d(self, kernel_size, stride, padding, dilation, ceil_mode);
}

at::Tensor batch_norm(const at::Tensor& input, const OptionalTensor& weight,
                      const OptionalTensor& bias, const OptionalTensor& running_mean,
                      const OptionalTensor& running_var, bool training, double momentum, double eps,
                      bool cudnn_enabled) {
  const NormArguments norm{weight, bias,     running_mean, running_var, {},
                           false,  training, momentum,     eps};
  if (auto output = append_norm(input, norm)) return *output;
  before_use(input, false);
  for (const auto& tensor : {weight, bias}) before_use(tensor.value_or(at::Tensor()), false);
  for (const auto& tensor : {running_mean, running_var})
    before_use(tensor.value_or(at::Tensor()), training);
  Through through(kKey);
  return at::batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps,
                        cudnn_enabled);
}

at::Tensor dropout(const at::Tensor& input, double p, bool train) {
  if (as_deferred(input) != nullptr && (!train || p == 0)) return input;
  if (train && 0 < p && p < 1) {
    if (auto output = append_dropout(input, p)) return *output;
    before_use(input, false);
    Session* session = Session::current();
    if (session != nullptr && session->undisturbed()) {
      InSession scope(*session);
      const auto output = session->engine().attr("drop")(input, p);
      if (!output.is_none()) return output.cast<at::Tensor>();
    }
  }
  before_use(input, false);
  Through through(kKey);
  return at::dropout(input, p, train);
}

void before_use(const c10::IValue& value, bool written) {
  if (value.isTensor()) {
    before_use(value.toTensor(), written);
  } else if (value.isTensorList()) {
    for (const at::Tensor& tensor : value.toTensorList()) before_use(tensor, written);
  } else if (value.isOptionalTensorList()) {
    for (const OptionalTensor& tensor : value.toOptionalTensorList())
      before_use(tensor.value_or(at::Tensor()), written);
  }
}

void any_other(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const size_t first = stack->size() - arguments.size();
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto* alias = arguments[i].alias_info();
    before_use((*stack)[first + i], alias != nullptr && alias->isWrite());
  }
  Through through(kKey);
  op.callBoxed(stack);
}

TORCH_LIBRARY_IMPL(_, TESTING_ONLY_GenericWrapper, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&any_other>());
}

TORCH_LIBRARY_IMPL(aten, TESTING_ONLY_GenericWrapper, m) {
  m.impl("relu", &relu);
  m.impl("relu_", &relu_);
  m.impl("add.Tensor", &add);
  m.impl("add_.Tensor", &add_);
  m.impl("max_pool2d", &max_pool2d);
  m.impl("batch_norm", &batch_norm);
  m.impl("dropout", &dropout);
}

}  // namespace
}  // namespace wus::deferral
