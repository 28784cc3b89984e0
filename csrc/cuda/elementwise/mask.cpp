#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "common/activation.h"
#include "cuda/elementwise/mask_kernels.h"
#include "cuda/launch.h"

namespace wus::cuda {
namespace {

// input, other and output are dense and of one type; other may be undefined, output may be input.
at::Tensor relu_into(const at::Tensor& input, const at::Tensor& other, const at::Tensor& output) {
  const Rows shape(input);
  at::Tensor mask = empty_mask(input);
  if (input.numel() == 0) return mask;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  WUS_DISPATCH_DTYPE(input.scalar_type(), "activate", [&] {
    relu(input.const_data_ptr<scalar_t>(), Affine{},
         other.defined() ? other.const_data_ptr<scalar_t>() : nullptr, /*relu=*/true,
         output.data_ptr<scalar_t>(), mask.data_ptr<uint8_t>(), shape.rows, shape.channels, stream);
  });
  return mask;
}

void check_relu(int64_t act) {
  TORCH_CHECK_VALUE(act == kRelu, "act must be 1 (ReLU) on a GPU, got ", act);
}

std::tuple<at::Tensor, at::Tensor> activate(const at::Tensor& input,
                                            const std::optional<at::Tensor>& other, int64_t act,
                                            double /*slope*/) {
  check_relu(act);
  check_float(input, "input");
  if (other) {
    check_same_size(*other, "other", input, "input");
    TORCH_CHECK_VALUE(
        other->scalar_type() == input.scalar_type() && other->device() == input.device(),
        "other must be ", input.scalar_type(), " on ", input.device(), " as input is, got ",
        other->scalar_type(), " on ", other->device());
  }
  const c10::cuda::CUDAGuard guard(input.device());
  const at::Tensor x = as_rows(input, "input");
  at::Tensor output = empty_rows(x);
  at::Tensor mask = relu_into(x, other ? as_rows(*other, "other") : at::Tensor(), output);
  return {output, mask};
}

std::tuple<at::Tensor, at::Tensor> activate_(at::Tensor input, int64_t act, double /*slope*/) {
  check_relu(act);
  const c10::cuda::CUDAGuard guard(input.device());
  check_float(input, "input");
  check_dense(input, "input");
  at::Tensor mask = relu_into(input, {}, input);
  return {input, mask};
}

at::Tensor apply_mask(const at::Tensor& grad_output, const at::Tensor& mask, double scale) {
  check_float(grad_output, "grad_output");
  check_mask(mask, grad_output);
  const c10::cuda::CUDAGuard guard(grad_output.device());
  const at::Tensor grad = as_rows(grad_output, "grad_output");
  at::Tensor output = empty_rows(grad);
  if (grad.numel() == 0) return output;
  const Rows shape(grad);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  WUS_DISPATCH_DTYPE(grad.scalar_type(), "apply_mask", [&] {
    cuda::apply_mask(grad.const_data_ptr<scalar_t>(), mask.const_data_ptr<uint8_t>(),
                     static_cast<float>(scale), output.data_ptr<scalar_t>(), shape.rows,
                     shape.channels, stream);
  });
  return output;
}

std::tuple<at::Tensor, at::Tensor> activate_grad(const at::Tensor& grad_output,
                                                 const std::optional<at::Tensor>& mask,
                                                 const std::optional<at::Tensor>& /*input*/,
                                                 int64_t act, double /*slope*/,
                                                 bool need_grad_input, bool need_grad_bias) {
  check_float(grad_output, "grad_output");
  if (act != kNone) {
    check_relu(act);
    TORCH_CHECK_VALUE(mask, "mask must be given for act 1");
    check_mask(*mask, grad_output);
  }
  if (!need_grad_bias) {
    const bool wanted = act != kNone && need_grad_input;
    return {wanted ? apply_mask(grad_output, *mask, 1) : nothing(grad_output),
            nothing(grad_output)};
  }
  const c10::cuda::CUDAGuard guard(grad_output.device());
  const at::Tensor grad = as_rows(grad_output, "grad_output");
  const Rows shape(grad);
  const bool store = act != kNone && need_grad_input;
  at::Tensor grad_input = store ? empty_rows(grad) : nothing(grad);
  const auto floats = grad.options().dtype(at::kFloat);
  if (grad.numel() == 0) return {grad_input, at::zeros({shape.channels}, floats)};
  at::Tensor grad_bias = at::empty({shape.channels}, floats);
  at::Tensor partial = at::empty({partial_sums(shape.rows, shape.channels)}, floats);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  WUS_DISPATCH_DTYPE(grad.scalar_type(), "activate_grad", [&] {
    cuda::mask_bias_grad(
        grad.const_data_ptr<scalar_t>(), act != kNone ? mask->const_data_ptr<uint8_t>() : nullptr,
        store ? grad_input.data_ptr<scalar_t>() : nullptr, partial.data_ptr<float>(),
        grad_bias.data_ptr<float>(), shape.rows, shape.channels, stream);
  });
  return {grad_input, grad_bias};
}

TORCH_LIBRARY_IMPL(wus, CUDA, m) {
  m.impl("activate", &activate);
  m.impl("activate_", &activate_);
  m.impl("apply_mask", &apply_mask);
  m.impl("activate_grad", &activate_grad);
}

}  // namespace
}  // namespace wus::cuda
