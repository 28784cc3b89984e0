#include "autograd/gate.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/adaptive_avg_pool2d.h>
#include <ATen/ops/div.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>

#include <optional>
#include <tuple>

namespace wus {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Node;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> gradients(const Tensor& grad, const OptionalTensor& input,
                                     const OptionalTensor& gate) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("wus::gate_grad", "")
                             .typed<std::tuple<Tensor, Tensor>(const Tensor&, const OptionalTensor&,
                                                               const OptionalTensor&)>();
  return op.call(grad, input, gate);
}

class Gate : public torch::autograd::Function<Gate> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& input, const Tensor& gate) {
    context->set_materialize_grads(false);
    context->save_for_backward(
        {gate.requires_grad() ? input : Tensor(), input.requires_grad() ? gate : Tensor()});
    return at::mul(input, gate);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const Tensor& grad = grads[0];
    if (!grad.defined()) return {Tensor(), Tensor()};
    const auto saved = context->get_saved_variables();
    const auto wanted = [&](int argument) {  // each one's gradient is made of the other
      return context->needs_input_grad(argument) ? OptionalTensor(saved[1 - argument])
                                                 : std::nullopt;
    };
    const OptionalTensor gate = wanted(0), input = wanted(1);
    // Torch's own have a derivative, and keep another layout.
    if (at::GradMode::is_enabled() || !grad.is_contiguous(at::MemoryFormat::ChannelsLast)) {
      return {gate ? at::mul(grad, *gate) : Tensor(),
              input ? at::mul(grad, *input).sum({2, 3}, /*keepdim=*/true) : Tensor()};
    }
    const auto [grad_input, grad_gate] = gradients(grad, input, gate);
    return {gate ? grad_input : Tensor(), input ? grad_gate : Tensor()};
  }
};

// Whether anybody but the function itself is handed a function's gradient in this pass.
bool is_looked_at(Node& function) {
  if (!function.pre_hooks().empty() || !function.tensor_pre_hooks().empty() ||
      !function.retains_grad_hooks().empty())
    return true;
  const auto* tasks = torch::autograd::get_current_graph_task_exec_info();
  if (tasks == nullptr) return false;
  const auto found = tasks->find(&function);
  return found != tasks->end() && found->second.captures_ != nullptr;
}

class GlobalMeanFunction : public torch::autograd::Function<GlobalMeanFunction> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& input, GlobalMean kind) {
    context->set_materialize_grads(false);
    context->saved_data["sizes"] = input.sizes();
    if (kind == GlobalMean::kPool) return at::adaptive_avg_pool2d(input, {1, 1});
    return at::mean(input, {2, 3}, kind == GlobalMean::kMeanKeepDim);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    if (!grads[0].defined()) return {Tensor(), Tensor()};
    const auto sizes = context->saved_data["sizes"].toIntVector();
    const Tensor grad = grads[0].view({sizes[0], sizes[1], 1, 1});
    const at::Scalar pixels(sizes[2] * sizes[3]);
    const auto behind = torch::autograd::get_current_node()->next_edge(0).function;
    const bool as_torch = behind == nullptr || is_looked_at(*behind);
    return {as_torch ? at::div(grad.expand(sizes), pixels) : at::div(grad, pixels).expand(sizes),
            Tensor()};
  }
};

}  // namespace

Tensor gated(const Tensor& input, const Tensor& gate) { return Gate::apply(input, gate); }

Tensor global_mean(const Tensor& input, GlobalMean kind) {
  return GlobalMeanFunction::apply(input, kind);
}

}  // namespace wus
