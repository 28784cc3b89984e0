// What an operator does that is handed a deferred tensor: a chain takes in the few that it can, for
// every other the tensor is computed first.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/adaptive_avg_pool2d.h>
#include <ATen/ops/add.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/hardsigmoid.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/hardtanh.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/relu6.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <utility>

#include "common/activation.h"
#include "deferral/append.h"
#include "deferral/deferred.h"
#include "deferral/gate.h"
#include "deferral/session.h"

namespace wus::deferral {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

void before_use(const at::Tensor& tensor, bool written) {
  if (Deferred* deferred = as_deferred(tensor)) deferred->settle();
  Session* session = Session::current();
  if (session != nullptr && tensor.defined()) session->before_use(tensor, written);
}

// Around the operator itself, behind which nothing is deferred.
using Through = c10::impl::ExcludeDispatchKeyGuard;

// Whether operators of ours may stand for torch's, where gradients are taken.
bool is_undisturbed() {
  const Session* session = Session::current();
  return session != nullptr && session->undisturbed() && at::GradMode::is_enabled();
}

// An activation that a chain takes in, else the operator itself.
template <class Stock>
at::Tensor activate(const at::Tensor& self, Act act, const Stock& stock) {
  if (act.kind != kNone) {
    if (auto output = append_activation(self, act, false)) return *output;
  }
  before_use(self, false);
  Through through(kKey);
  return stock(self);
}

template <class Stock>
at::Tensor& activate_(at::Tensor& self, Act act, const Stock& stock) {
  if (act.kind != kNone && append_activation(self, act, true)) return self;
  before_use(self, true);
  Through through(kKey);
  return stock(self);
}

// An activation without parameters.
template <int kKind, auto kStock>
at::Tensor plain(const at::Tensor& self) {
  return activate(self, {kKind}, kStock);
}

template <int kKind, auto kStock>
at::Tensor& plain_(at::Tensor& self) {
  return activate_(self, {kKind}, kStock);
}

Act hardtanh_act(const at::Scalar& min, const at::Scalar& max) {
  return {min.toDouble() == 0 && max.toDouble() == 6 ? kRelu6 : kNone};
}

at::Tensor hardtanh(const at::Tensor& self, const at::Scalar& min, const at::Scalar& max) {
  return activate(self, hardtanh_act(min, max),
                  [&](const at::Tensor& x) { return at::hardtanh(x, min, max); });
}

at::Tensor& hardtanh_(at::Tensor& self, const at::Scalar& min, const at::Scalar& max) {
  return activate_(self, hardtanh_act(min, max),
                   [&](at::Tensor& x) -> at::Tensor& { return at::hardtanh_(x, min, max); });
}

// Of a negative slope the output does not tell the input's sign.
Act leaky_relu_act(const at::Scalar& slope) {
  return {slope.toDouble() > 0 ? kLeakyRelu : kNone, slope.toDouble()};
}

at::Tensor leaky_relu(const at::Tensor& self, const at::Scalar& slope) {
  return activate(self, leaky_relu_act(slope),
                  [&](const at::Tensor& x) { return at::leaky_relu(x, slope); });
}

at::Tensor& leaky_relu_(at::Tensor& self, const at::Scalar& slope) {
  return activate_(self, leaky_relu_act(slope),
                   [&](at::Tensor& x) -> at::Tensor& { return at::leaky_relu_(x, slope); });
}

Act gelu_act(std::string_view approximate) {
  return {approximate == "none" ? kGelu : approximate == "tanh" ? kGeluTanh : kNone};
}

at::Tensor gelu(const at::Tensor& self, std::string_view approximate) {
  return activate(self, gelu_act(approximate),
                  [&](const at::Tensor& x) { return at::gelu(x, approximate); });
}

at::Tensor& gelu_(at::Tensor& self, std::string_view approximate) {
  return activate_(self, gelu_act(approximate),
                   [&](at::Tensor& x) -> at::Tensor& { return at::gelu_(x, approximate); });
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

at::Tensor mul(const at::Tensor& self, const at::Tensor& other) {
  const bool ours = is_undisturbed();
  before_use(self, false);
  before_use(other, false);
  Through through(kKey);
  const auto output = ours ? times_gate(self, other) : std::nullopt;
  return output ? *output : at::mul(self, other);
}

at::Tensor mean(const at::Tensor& self, at::OptionalIntArrayRef dims, bool keepdim,
                std::optional<at::ScalarType> dtype) {
  const bool ours = !dtype && as_deferred(self) != nullptr && is_undisturbed();
  before_use(self, false);
  Through through(kKey);
  const auto output = ours ? mean_over_pixels(self, dims, keepdim) : std::nullopt;
  return output ? *output : at::mean(self, dims, keepdim, dtype);
}

at::Tensor adaptive_avg_pool2d(const at::Tensor& self, c10::SymIntArrayRef output_size) {
  const bool ours = as_deferred(self) != nullptr && is_undisturbed();
  before_use(self, false);
  Through through(kKey);
  const auto output =
      ours ? pooled_to_one(self, c10::asIntArrayRefSlowOpt(output_size)) : std::nullopt;
  return output ? *output : at::adaptive_avg_pool2d_symint(self, output_size);
}

at::Tensor max_pool2d(const at::Tensor& self, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                      at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  // What stands for both dimensions, if one does.
  const auto square = [](at::IntArrayRef values) {
    return values.size() == 1 || (values.size() == 2 && values[0] == values[1])
               ? std::optional(values[0])
               : std::nullopt;
  };
  const auto kernel = square(kernel_size), pad = square(padding);
  const auto step = stride.empty() ? kernel : square(stride);
  if (kernel && step && pad && square(dilation) == 1) {
    if (auto output = append_pool(self, {*kernel, *step, *pad, ceil_mode})) return *output;
  }
  before_use(self, false);
  Through through(kKey);
  return at::max_pool2d(self, kernel_size, stride, padding, dilation, ceil_mode);
}

at::Tensor batch_norm(const at::Tensor& input, const OptionalTensor& weight,
                      const OptionalTensor& bias, const OptionalTensor& running_mean,
                      const OptionalTensor& running_var, bool training, double momentum, double eps,
                      bool cudnn_enabled) {
  const NormArguments norm{weight, bias,  running_mean, running_var, {},
                           false,  false, training,     momentum,    eps};
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
  m.impl("relu", &plain<kRelu, at::relu>);
  m.impl("relu_", &plain_<kRelu, at::relu_>);
  m.impl("relu6", &plain<kRelu6, at::relu6>);
  m.impl("relu6_", &plain_<kRelu6, at::relu6_>);
  m.impl("hardsigmoid", &plain<kHardsigmoid, at::hardsigmoid>);
  m.impl("hardsigmoid_", &plain_<kHardsigmoid, at::hardsigmoid_>);
  m.impl("hardswish", &plain<kHardswish, at::hardswish>);
  m.impl("hardswish_", &plain_<kHardswish, at::hardswish_>);
  m.impl("silu", &plain<kSilu, at::silu>);
  m.impl("silu_", &plain_<kSilu, at::silu_>);
  m.impl("sigmoid", &plain<kSigmoid, at::sigmoid>);
  m.impl("sigmoid_", &plain_<kSigmoid, at::sigmoid_>);
  m.impl("hardtanh", &hardtanh);
  m.impl("hardtanh_", &hardtanh_);
  m.impl("leaky_relu", &leaky_relu);
  m.impl("leaky_relu_", &leaky_relu_);
  m.impl("gelu", &gelu);
  m.impl("gelu_", &gelu_);
  m.impl("add.Tensor", &add);
  m.impl("add_.Tensor", &add_);
  m.impl("mul.Tensor", &mul);
  m.impl("mean.dim", &mean);
  m.impl("adaptive_avg_pool2d", &adaptive_avg_pool2d);
  m.impl("max_pool2d", &max_pool2d);
  m.impl("batch_norm", &batch_norm);
  m.impl("dropout", &dropout);
}

}  // namespace
}  // namespace wus::deferral
