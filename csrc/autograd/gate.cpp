#include "autograd/gate.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/adaptive_avg_pool2d.h>
#include <ATen/ops/div.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <tuple>

namespace wus {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> gradients(const Tensor& grad, const OptionalTensor& input,
                                     const Tensor& gate, bool need_input) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("wus::gate_grad", "")
                             .typed<std::tuple<Tensor, Tensor>(const Tensor&, const OptionalTensor&,
                                                               const Tensor&, bool)>();
  return op.call(grad, input, gate, need_input);
}

class Gate : public torch::autograd::Function<Gate> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& input, const Tensor& gate) {
    context->save_for_backward({gate.requires_grad() ? input : Tensor(), gate});
    return at::mul(input, gate);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const Tensor& grad = grads[0];
    if (!grad.defined()) return {Tensor(), Tensor()};
    const auto saved = context->get_saved_variables();
    const Tensor &input = saved[0], &gate = saved[1];
    const bool need_input = context->needs_input_grad(0), need_gate = context->needs_input_grad(1);
    if (at::GradMode::is_enabled()) {  // of operators that have a derivative
      return {need_input ? at::mul(grad, gate) : Tensor(),
              need_gate ? at::mul(grad, input).sum({2, 3}, /*keepdim=*/true) : Tensor()};
    }
    const auto [grad_input, grad_gate] =
        gradients(grad, need_gate ? OptionalTensor(input) : std::nullopt, gate, need_input);
    return {need_input ? grad_input : Tensor(), need_gate ? grad_gate : Tensor()};
  }
};

enum class Mean { kDropped, kKept, kPooled };

Tensor mean_of(const Tensor& input, Mean mean) {
  if (mean == Mean::kPooled) return at::adaptive_avg_pool2d(input, {1, 1});
  return at::mean(input, {2, 3}, mean == Mean::kKept);
}

class PixelMean : public torch::autograd::Function<PixelMean> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& input, Mean mean) {
    context->saved_data["sizes"] = input.sizes();
    return mean_of(input, mean);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    if (!grads[0].defined()) return {Tensor(), Tensor()};
    const auto sizes = context->saved_data["sizes"].toIntVector();
    const Tensor each = at::div(grads[0], at::Scalar(sizes[2] * sizes[3]));
    return {each.view({sizes[0], sizes[1], 1, 1}).expand(sizes), Tensor()};
  }
};

}  // namespace

Tensor gated(const Tensor& input, const Tensor& gate) { return Gate::apply(input, gate); }

Tensor pixel_mean(const Tensor& input, bool keep) {
  return PixelMean::apply(input, keep ? Mean::kKept : Mean::kDropped);
}

Tensor pixel_average(const Tensor& input) { return PixelMean::apply(input, Mean::kPooled); }

}  // namespace wus
