// Convolutions of any rank, transposed or not, whose skip step saves the weight only: no input, no
// weight gradient.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/complex.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/imag.h>
#include <ATen/ops/real.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace wus {
namespace {

using at::SymIntArrayRef;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;
using SymInts = std::vector<c10::SymInt>;

// The numbers of a convolution of N spatial dimensions, each of size N.
struct Geometry {
  SymInts stride, padding, dilation;
  bool transposed;
  SymInts output_padding;
  c10::SymInt groups;
};

void check_types(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                 bool transposed) {
  const bool complex = input.is_complex() || weight.is_complex();
  TORCH_CHECK(!bias || bias->scalar_type() == input.scalar_type() || (transposed && !complex),
              "Input type (", input.scalar_type(), ") and bias type (", bias->scalar_type(),
              ") should be the same");
  TORCH_CHECK(weight.scalar_type() == input.scalar_type() || !complex, "Input type (",
              input.scalar_type(), ") and weight type (", weight.scalar_type(),
              ") should be the same");
}

// at::convolution, of complex numbers too: as three real convolutions, like at::conv2d.
Tensor convolve(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                bool transposed, SymIntArrayRef output_padding, const c10::SymInt& groups) {
  check_types(input, weight, bias, transposed);
  const auto run = [&](const Tensor& x, const Tensor& w, const OptionalTensor& b) {
    return at::convolution_symint(x, w, b, stride, padding, dilation, transposed, output_padding,
                                  groups);
  };
  if (!input.is_complex()) return run(input, weight, bias);
  const Tensor x_real = at::real(input), x_imag = at::imag(input);
  const Tensor w_real = at::real(weight), w_imag = at::imag(weight);
  OptionalTensor b_real, b_sum;
  if (bias) {
    b_real = at::real(*bias);
    b_sum = *b_real + at::imag(*bias);
  }
  const Tensor real = run(x_real, w_real, b_real), imag = run(x_imag, w_imag, std::nullopt);
  return at::complex(real - imag, run(x_real + x_imag, w_real + w_imag, b_sum) - real - imag);
}

// The convolution the other way round: from the output's gradient to the input's, for which the
// input's size is enough.
Tensor dgrad(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size,
             const Geometry& g) {
  const auto dims = static_cast<int64_t>(g.stride.size());
  SymInts output_padding(dims, 0);
  for (int64_t i = 0; i < dims && !g.transposed; ++i) {
    const auto reached = (grad_output.sym_size(i + 2) - 1) * g.stride[i] - g.padding[i] * 2 +
                         g.dilation[i] * (weight.sym_size(i + 2) - 1) + 1;
    output_padding[i] = input_size[i] - reached;
  }
  auto grad_input = convolve(grad_output, weight.conj(), std::nullopt, g.stride, g.padding,
                             g.dilation, !g.transposed, output_padding, g.groups);
  // An output padding as large as the stride, which a dilation allows, makes the way back longer.
  for (int64_t i = 0; i < dims && g.transposed; ++i) {
    if (g.output_padding[i] >= g.stride[i]) {
      grad_input = grad_input.narrow_symint(i + 2, 0, input_size[i]);
    }
  }
  return grad_input;
}

// Stock's gradient of the input is laid out like the output.
Tensor laid_out(const Tensor& tensor, at::MemoryFormat format) {
  constexpr c10::DispatchKeySet kBatched(
      {c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched});
  return tensor.key_set().has_any(kBatched) ? tensor : tensor.contiguous(format);
}

class SkipConvolution : public torch::autograd::Function<SkipConvolution> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                        const OptionalTensor& bias, SymIntArrayRef stride, SymIntArrayRef padding,
                        SymIntArrayRef dilation, bool transposed, SymIntArrayRef output_padding,
                        const c10::SymInt& groups) {
    ctx->set_materialize_grads(false);
    if (input.requires_grad()) ctx->save_for_backward({weight});
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["input_size"] = input.sym_sizes().slice(2);
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["transposed"] = transposed;
    ctx->saved_data["output_padding"] = output_padding;
    ctx->saved_data["groups"] = groups;
    const Tensor output = convolve(input, weight, bias, stride, padding, dilation, transposed,
                                   output_padding, groups);
    ctx->saved_data["format"] = output.suggest_memory_format();
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto& grad_output = grad_outputs[0];
    Tensor grad_input;
    Tensor grad_bias;
    if (grad_output.defined()) {
      if (ctx->needs_input_grad(0)) {
        const auto format = ctx->saved_data["format"].toMemoryFormat();
        grad_input = laid_out(dgrad(laid_out(grad_output, format), ctx->get_saved_variables()[0],
                                    ctx->saved_data["input_size"].toSymIntVector(), geometry(ctx)),
                              format);
      }
      if (needs_bias_grad(ctx)) grad_bias = grad_output.sum(all_but_channels(grad_output));
    }
    return {grad_input, Tensor(), grad_bias, Tensor(), Tensor(),
            Tensor(),   Tensor(), Tensor(),  Tensor()};
  }

 private:
  static Geometry geometry(AutogradContext* ctx) {
    return {ctx->saved_data["stride"].toSymIntVector(),
            ctx->saved_data["padding"].toSymIntVector(),
            ctx->saved_data["dilation"].toSymIntVector(),
            ctx->saved_data["transposed"].toBool(),
            ctx->saved_data["output_padding"].toSymIntVector(),
            ctx->saved_data["groups"].toSymInt()};
  }

  // An absent bias has no edge to ask about.
  static bool needs_bias_grad(AutogradContext* ctx) {
    return ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2);
  }

  static std::vector<int64_t> all_but_channels(const Tensor& grad_output) {
    std::vector<int64_t> dims{0};
    for (int64_t i = 2; i < grad_output.dim(); ++i) dims.push_back(i);
    return dims;
  }
};

Tensor convolution(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                   SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                   bool transposed, SymIntArrayRef output_padding, c10::SymInt groups) {
  return convolve(input, weight, bias, stride, padding, dilation, transposed, output_padding,
                  groups);
}

Tensor convolution_autograd(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                            SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                            bool transposed, SymIntArrayRef output_padding, c10::SymInt groups) {
  const auto sizes = stride.size();
  TORCH_CHECK(padding.size() == sizes && dilation.size() == sizes && output_padding.size() == sizes,
              "convolution: stride, padding, dilation and output_padding must be equally long");
  const auto dims = static_cast<int64_t>(sizes) + 2;
  TORCH_CHECK(input.dim() == dims && weight.dim() == dims,
              "convolution: input and weight must have ", dims, " dimensions for a stride of ",
              sizes, " numbers, but have ", input.dim(), " and ", weight.dim());
  // A skipped weight is a constant: detached, so that nothing upstream of it waits for a gradient.
  return SkipConvolution::apply(input, weight.detach(), bias, stride, padding, dilation, transposed,
                                output_padding, groups);
}

template <c10::DeviceType device, c10::DispatchKey key>
Tensor convolution_autocast(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                            SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                            bool transposed, SymIntArrayRef output_padding, c10::SymInt groups) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("wus::convolution", "")
                             .typed<decltype(convolution)>();
  const auto dtype = at::autocast::get_lower_precision_fp_from_device_type(device);
  return op.call(at::autocast::cached_cast(dtype, input, device),
                 at::autocast::cached_cast(dtype, weight, device),
                 at::autocast::cached_cast(dtype, bias, device), stride, padding, dilation,
                 transposed, output_padding, groups);
}

TORCH_LIBRARY_IMPL(wus, CPU, m) { m.impl("convolution", convolution); }
TORCH_LIBRARY_IMPL(wus, CUDA, m) { m.impl("convolution", convolution); }
TORCH_LIBRARY_IMPL(wus, Autograd, m) { m.impl("convolution", convolution_autograd); }
TORCH_LIBRARY_IMPL(wus, AutocastCPU, m) {
  m.impl("convolution", convolution_autocast<c10::kCPU, c10::DispatchKey::AutocastCPU>);
}
TORCH_LIBRARY_IMPL(wus, AutocastCUDA, m) {
  m.impl("convolution", convolution_autocast<c10::kCUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace
}  // namespace wus
