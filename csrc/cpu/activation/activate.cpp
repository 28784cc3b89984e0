#include <torch/library.h>

#include <optional>
#include <tuple>

#include "cpu/activation/gradient.h"
#include "cpu/parallel_rows.h"

namespace wus::cpu {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

template <class T>
std::tuple<at::Tensor, at::Tensor> activate_into(const at::Tensor& input, const at::Tensor& other,
                                                 int64_t act, double slope,
                                                 const at::Tensor& output) {
  check_act(act);
  const Rows shape(input);
  at::Tensor mask = has_bits(static_cast<int>(act)) ? empty_mask(input) : nothing(input, at::kByte);
  const Activated<T> op = {data<T>(input),           nullptr,        nullptr,
                           data<T>(other),           shape.channels, static_cast<int>(act),
                           static_cast<float>(slope)};
  T* y = mutable_data<T>(output);
  uint8_t* bits = mask.numel() ? mask.data_ptr<uint8_t>() : nullptr;
  for_rows(shape.rows, shape.channels, [&](int64_t begin, int64_t end) {
    WUS_DISPATCH(activation_kernels<T>())
        .forward(op, begin, end, {y + begin * shape.channels, shape.channels},
                 bits ? bits + begin * shape.mask_bytes() : nullptr);
  });
  return {output, mask};
}

std::tuple<at::Tensor, at::Tensor> activate(const at::Tensor& input, const OptionalTensor& other,
                                            int64_t act, double slope) {
  return for_type(input, "input", [&](auto element) {
    using T = decltype(element);
    const at::Tensor x = as_rows<T>(input, "input");
    at::Tensor z;
    if (other) {
      TORCH_CHECK_VALUE(act == kNone || has_bits(static_cast<int>(act)),
                        "other needs an act whose backward needs no input (0 to 4), got ", act);
      z = as_rows<T>(*other, "other");
      check_same_size(z, "other", x, "input");
    }
    return activate_into<T>(x, z, act, slope, empty_rows(x));
  });
}

std::tuple<at::Tensor, at::Tensor> activate_(at::Tensor input, int64_t act, double slope) {
  return for_type(input, "input", [&](auto element) {
    check_dense(input, "input");
    return activate_into<decltype(element)>(input, {}, act, slope, input);
  });
}

template <class T>
std::tuple<at::Tensor, at::Tensor> pass(const PassedGradient<T>& gradient, bool need_grad_input,
                                        bool need_grad_bias) {
  const int64_t channels = gradient.op.channels;
  const bool store = gradient.op.act != kNone && need_grad_input;
  at::Tensor grad_input =
      store ? empty_rows(gradient.grad) : nothing(gradient.grad, gradient.grad.scalar_type());
  T* out = store ? mutable_data<T>(grad_input) : nullptr;
  const auto& kernels = WUS_DISPATCH(activation_kernels<T>());
  if (!need_grad_bias) {
    if (store) {
      for_rows(gradient.rows, channels, [&](int64_t begin, int64_t end) {
        kernels.backward(gradient.op, nullptr, begin, end, {out + begin * channels, channels},
                         nullptr);
      });
    }
    return {grad_input, nothing(gradient.grad)};
  }
  const at::Tensor sums = sum_over_rows(gradient.rows, channels, channels,
                                        [&](int64_t begin, int64_t end, double* sum) {
                                          kernels.grad_sums(gradient.op, nullptr, begin, end, sum,
                                                            out ? out + begin * channels : nullptr);
                                        });
  return {grad_input, sums.to(at::kFloat)};
}

std::tuple<at::Tensor, at::Tensor> activate_grad(const at::Tensor& grad_output,
                                                 const OptionalTensor& mask,
                                                 const OptionalTensor& input, int64_t act,
                                                 double slope, bool need_grad_input,
                                                 bool need_grad_bias) {
  return for_type(grad_output, "grad_output", [&](auto element) {
    const PassedGradient<decltype(element)> gradient(grad_output, mask, input, "input", {}, {}, act,
                                                     slope);
    return pass(gradient, need_grad_input, need_grad_bias);
  });
}

TORCH_LIBRARY_IMPL(wus, CPU, m) {
  m.impl("activate", &activate);
  m.impl("activate_", &activate_);
  m.impl("activate_grad", &activate_grad);
}

}  // namespace
}  // namespace wus::cpu
