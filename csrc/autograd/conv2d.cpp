// conv2d whose skip step saves the weight only: no input, no weight gradient.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace wus {
namespace {

using at::SymIntArrayRef;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kSpatial = 2;

// The data gradient as the transposed convolution it is: needs the input's size, never the input.
Tensor dgrad(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size,
             SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
             const c10::SymInt& groups) {
  std::array<c10::SymInt, kSpatial> output_padding;
  for (int64_t i = 0; i < kSpatial; ++i) {
    const auto reached = (grad_output.sym_size(i + 2) - 1) * stride[i] - padding[i] * 2 +
                         dilation[i] * (weight.sym_size(i + 2) - 1) + 1;
    output_padding[i] = input_size[i] - reached;
  }
  return at::convolution_symint(grad_output, weight, std::nullopt, stride, padding, dilation,
                                /*transposed=*/true, output_padding, groups);
}

class SkipConv2d : public torch::autograd::Function<SkipConv2d> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                        const OptionalTensor& bias, SymIntArrayRef stride, SymIntArrayRef padding,
                        SymIntArrayRef dilation, const c10::SymInt& groups) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({weight});
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["input_size"] = input.sym_sizes().slice(2);
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["groups"] = groups;
    return at::conv2d_symint(input, weight, bias, stride, padding, dilation, groups);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto& grad_output = grad_outputs[0];
    Tensor grad_input;
    Tensor grad_bias;
    if (grad_output.defined()) {
      if (ctx->needs_input_grad(0)) {
        grad_input = dgrad(
            grad_output, ctx->get_saved_variables()[0],
            ctx->saved_data["input_size"].toSymIntVector(),
            ctx->saved_data["stride"].toSymIntVector(), ctx->saved_data["padding"].toSymIntVector(),
            ctx->saved_data["dilation"].toSymIntVector(), ctx->saved_data["groups"].toSymInt());
      }
      if (needs_bias_grad(ctx)) grad_bias = grad_output.sum({0, 2, 3});
    }
    return {grad_input, Tensor(), grad_bias, Tensor(), Tensor(), Tensor(), Tensor()};
  }

 private:
  // An absent bias has no edge to ask about.
  static bool needs_bias_grad(AutogradContext* ctx) {
    return ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2);
  }
};

Tensor conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
              SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
              c10::SymInt groups, bool /*skip_wgrad*/) {
  return at::conv2d_symint(input, weight, bias, stride, padding, dilation, groups);
}

Tensor conv2d_autograd(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                       SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                       c10::SymInt groups, bool skip_wgrad) {
  if (!skip_wgrad) {
    return at::conv2d_symint(input, weight, bias, stride, padding, dilation, groups);
  }
  TORCH_CHECK(input.dim() == 3 || input.dim() == 4,
              "conv2d: input must be (C, H, W) or (N, C, H, W), but has ", input.dim(),
              " dimensions");
  // A skipped weight is a constant: detached, so that nothing upstream of it waits for a gradient.
  const auto frozen = weight.detach();
  if (input.dim() == 3) {
    return SkipConv2d::apply(input.unsqueeze(0), frozen, bias, stride, padding, dilation, groups)
        .squeeze(0);
  }
  return SkipConv2d::apply(input, frozen, bias, stride, padding, dilation, groups);
}

template <c10::DeviceType device, c10::DispatchKey key>
Tensor conv2d_autocast(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                       SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                       c10::SymInt groups, bool skip_wgrad) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("wus::conv2d", "").typed<decltype(conv2d)>();
  const auto dtype = at::autocast::get_lower_precision_fp_from_device_type(device);
  return op.call(at::autocast::cached_cast(dtype, input, device),
                 at::autocast::cached_cast(dtype, weight, device),
                 at::autocast::cached_cast(dtype, bias, device), stride, padding, dilation, groups,
                 skip_wgrad);
}

TORCH_LIBRARY_IMPL(wus, CPU, m) { m.impl("conv2d", conv2d); }
TORCH_LIBRARY_IMPL(wus, CUDA, m) { m.impl("conv2d", conv2d); }
TORCH_LIBRARY_IMPL(wus, Autograd, m) { m.impl("conv2d", conv2d_autograd); }
TORCH_LIBRARY_IMPL(wus, AutocastCPU, m) {
  m.impl("conv2d", conv2d_autocast<c10::kCPU, c10::DispatchKey::AutocastCPU>);
}
TORCH_LIBRARY_IMPL(wus, AutocastCUDA, m) {
  m.impl("conv2d", conv2d_autocast<c10::kCUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace
}  // namespace wus
