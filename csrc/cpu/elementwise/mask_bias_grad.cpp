#include <torch/library.h>

#include <optional>
#include <tuple>

#include "cpu/elementwise/mask_kernels.h"
#include "cpu/parallel_rows.h"

namespace wus::cpu {
namespace {

std::tuple<at::Tensor, at::Tensor> mask_bias_grad(const at::Tensor& grad_output,
                                                  const std::optional<at::Tensor>& mask,
                                                  bool need_grad_input) {
  const at::Tensor grad = as_rows(grad_output, "grad_output");
  if (mask) check_mask(*mask, grad);
  const Rows shape(grad);
  const bool store = mask && need_grad_input;
  at::Tensor grad_input = store ? empty_rows(grad) : nothing(grad);
  const float* g = grad.const_data_ptr<float>();
  const uint8_t* bits = mask ? mask->const_data_ptr<uint8_t>() : nullptr;
  float* out = store ? grad_input.data_ptr<float>() : nullptr;
  const at::Tensor sums = sum_over_rows(
      shape.rows, shape.channels, shape.channels, [&](int64_t begin, int64_t end, double* sum) {
        const int64_t i = begin * shape.channels;
        WUS_DISPATCH(mask_kernels)
            .bias_grad(g + i, bits ? bits + begin * shape.mask_bytes() : nullptr,
                       out ? out + i : nullptr, sum, end - begin, shape.channels);
      });
  return {grad_input, sums.to(at::kFloat)};
}

TORCH_LIBRARY_IMPL(wus, CPU, m) { m.impl("mask_bias_grad", &mask_bias_grad); }

}  // namespace
}  // namespace wus::cpu
