// linear whose skip step saves the weight only: no input, no weight gradient.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/linear.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <numeric>

namespace wus {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

class SkipLinear : public torch::autograd::Function<SkipLinear> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                        const OptionalTensor& bias) {
    ctx->set_materialize_grads(false);
    if (input.requires_grad()) ctx->save_for_backward({weight});
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->saved_data["has_bias"] = bias.has_value();
    return at::linear(input, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto& grad_output = grad_outputs[0];
    Tensor grad_input;
    Tensor grad_bias;
    if (grad_output.defined()) {
      if (ctx->needs_input_grad(0)) {
        grad_input = grad_output.matmul(ctx->get_saved_variables()[0].conj());
      }
      if (needs_bias_grad(ctx)) grad_bias = sum_leading(grad_output);
    }
    return {grad_input, Tensor(), grad_bias};
  }

 private:
  // An absent bias has no edge to ask about.
  static bool needs_bias_grad(AutogradContext* ctx) {
    return ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2);
  }

  static Tensor sum_leading(const Tensor& grad_output) {
    if (grad_output.dim() == 1) return grad_output;
    std::vector<int64_t> leading(grad_output.dim() - 1);
    std::iota(leading.begin(), leading.end(), 0);
    return grad_output.sum(leading);
  }
};

Tensor linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  return at::linear(input, weight, bias);
}

Tensor linear_autograd(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  TORCH_CHECK(weight.dim() == 2, "linear: weight must be (out_features, in_features), but has ",
              weight.dim(), " dimensions");
  return SkipLinear::apply(input, weight.detach(), bias);
}

template <c10::DeviceType device, c10::DispatchKey key>
Tensor linear_autocast(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("wus::linear", "").typed<decltype(linear)>();
  const auto dtype = at::autocast::get_lower_precision_fp_from_device_type(device);
  return op.call(at::autocast::cached_cast(dtype, input, device),
                 at::autocast::cached_cast(dtype, weight, device),
                 at::autocast::cached_cast(dtype, bias, device));
}

TORCH_LIBRARY_IMPL(wus, CPU, m) { m.impl("linear", linear); }
TORCH_LIBRARY_IMPL(wus, CUDA, m) { m.impl("linear", linear); }
TORCH_LIBRARY_IMPL(wus, Autograd, m) { m.impl("linear", linear_autograd); }
TORCH_LIBRARY_IMPL(wus, AutocastCPU, m) {
  m.impl("linear", linear_autocast<c10::kCPU, c10::DispatchKey::AutocastCPU>);
}
TORCH_LIBRARY_IMPL(wus, AutocastCUDA, m) {
  m.impl("linear", linear_autocast<c10::kCUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace
}  // namespace wus
