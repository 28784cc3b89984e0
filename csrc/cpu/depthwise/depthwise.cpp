// Depthwise convolution (groups == inputs == outputs), maps of float32 or bfloat16, channels_last.
// Schemas, shapes and layouts: see ops.cpp.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "cpu/activation/gradient.h"
#include "cpu/batch_norm/statistics.h"
#include "cpu/depthwise/schedule.h"
#include "cpu/maps.h"
#include "cpu/parallel_rows.h"

namespace wus::cpu {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

DepthwiseShape shape_of(int64_t images, const Tensor& weight, at::IntArrayRef input_size,
                        at::IntArrayRef stride, at::IntArrayRef padding) {
  TORCH_CHECK_VALUE(
      weight.dim() == 4 && weight.size(0) > 0 && weight.size(1) == 1 &&
          (weight.size(2) == 3 || weight.size(2) == 5) && weight.size(3) == weight.size(2),
      "depthwise: weight must be [channels, 1, k, k] with k 3 or 5, got shape ", weight.sizes());
  check_float(weight, "depthwise: weight");
  TORCH_CHECK_VALUE(
      stride.size() == 2 && stride[0] == stride[1] && stride[0] >= 1 && stride[0] <= 2,
      "depthwise: stride must be (1, 1) or (2, 2), got ", stride);
  const int64_t kernel = weight.size(2);
  TORCH_CHECK_VALUE(padding.size() == 2 && std::min(padding[0], padding[1]) >= 0 &&
                        std::max(padding[0], padding[1]) < kernel,
                    "depthwise: padding must be 0 to ", kernel - 1, ", got ", padding);
  TORCH_CHECK_VALUE(input_size.size() == 2 && input_size[0] > 0 && input_size[1] > 0 &&
                        input_size[0] + 2 * padding[0] >= kernel &&
                        input_size[1] + 2 * padding[1] >= kernel,
                    "depthwise: an input of ", input_size, " with padding ", padding,
                    " is smaller than the kernel, ", kernel, "x", kernel);
  DepthwiseShape s{};
  s.images = images;
  s.channels = weight.size(0);
  s.height = input_size[0];
  s.width = input_size[1];
  s.oh = (s.height + 2 * padding[0] - kernel) / stride[0] + 1;
  s.ow = (s.width + 2 * padding[1] - kernel) / stride[1] + 1;
  s.kernel = kernel;
  s.stride = stride[0];
  s.padding_y = padding[0];
  s.padding_x = padding[1];
  return s;
}

void check_map(const Tensor& map, const char* name, const DepthwiseShape& s, int64_t height,
               int64_t width) {
  TORCH_CHECK_VALUE(map.sizes() == at::IntArrayRef({s.images, s.channels, height, width}),
                    "depthwise: ", name, " must have shape [", s.images, ", ", s.channels, ", ",
                    height, ", ", width, "], got ", map.sizes());
}

template <class T>
struct Forward {
  Tensor input, weight, bias, output;
  DepthwiseForward<T> work{};

  Forward(const Tensor& x, const Tensor& w, const OptionalTensor& b, at::IntArrayRef stride,
          at::IntArrayRef padding)
      : input(as_rows<T>(x, "input")), weight(w.contiguous()) {
    TORCH_CHECK_VALUE(x.dim() == 4, "depthwise: input must be [N, C, H, W], got shape ", x.sizes());
    const DepthwiseShape s = shape_of(x.size(0), w, x.sizes().slice(2), stride, padding);
    check_map(x, "input", s, s.height, s.width);
    bias = per_channel(b, "bias", s.channels);
    output = empty_map(input, s.channels, s.oh, s.ow);
    work.shape = s;
    work.input = data<T>(input);
    work.weight = data(weight);
    work.bias = data(bias);
    work.output = mutable_data<T>(output);
  }
};

std::tuple<Tensor, Tensor> depthwise_forward(const Tensor& input, const Tensor& weight,
                                             const OptionalTensor& bias, at::IntArrayRef stride,
                                             at::IntArrayRef padding, int64_t act, double slope) {
  check_act(act);
  return for_type(input, "input", [&](auto element) -> std::tuple<Tensor, Tensor> {
    Forward<decltype(element)> forward(input, weight, bias, stride, padding);
    const Tensor saved = forward.work.following.set(forward.output, act, slope);
    run_depthwise(forward.work);
    return {forward.output, saved};
  });
}

std::tuple<Tensor, Tensor, Tensor> depthwise_forward_stats(const Tensor& input,
                                                           const Tensor& weight,
                                                           const OptionalTensor& bias,
                                                           at::IntArrayRef stride,
                                                           at::IntArrayRef padding) {
  return for_type(input, "input", [&](auto element) -> std::tuple<Tensor, Tensor, Tensor> {
    const Forward<decltype(element)> forward(input, weight, bias, stride, padding);
    const auto& s = forward.work.shape;
    const auto [mean, var] = statistics(run_depthwise_sums(forward.work), s.images * s.oh * s.ow);
    return {forward.output, mean, var};
  });
}

// Of sums float64 [taps][channels].
Tensor weight_gradient(const Tensor& sums, const Tensor& weight) {
  Tensor grad =
      at::empty(weight.sizes(), weight.options().memory_format(weight.suggest_memory_format()));
  const int64_t channels = weight.size(0), taps = weight.numel() / channels;
  const double* from = sums.const_data_ptr<double>();
  float* to = grad.mutable_data_ptr<float>();
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      to[c * taps + tap] = static_cast<float>(from[tap * channels + c]);
    }
  }
  return grad;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> backward(const DepthwiseShape& s,
                                            const PassedGradient<T>& gradient, const Tensor& weight,
                                            const OptionalTensor& input, bool need_grad_input,
                                            bool need_grad_bias) {
  const Tensor w = weight.contiguous();
  DepthwiseBackward<T> work{};
  work.shape = s;
  work.grad = gradient.op;
  work.norm = gradient.norm();
  work.weight = data(w);
  Tensor grad_input = nothing(gradient.grad, kTypeOf<T>);
  if (need_grad_input) {
    grad_input = empty_map(gradient.grad, s.channels, s.height, s.width);
    work.grad_input = mutable_data<T>(grad_input);
  }
  Tensor source;
  if (input) {
    check_map(*input, "input", s, s.height, s.width);
    source = as_rows<T>(*input, "input");
    work.input = data<T>(source);
    work.need_weight = true;
  }
  const Tensor sums = run_depthwise_backward(work);
  return {grad_input, input ? weight_gradient(sums, weight) : nothing(w),
          need_grad_bias ? gradient.sum() : nothing(w)};
}

std::tuple<Tensor, Tensor, Tensor> depthwise_backward(
    const Tensor& grad_output, const Tensor& weight, const OptionalTensor& input,
    at::IntArrayRef input_size, at::IntArrayRef stride, at::IntArrayRef padding,
    const OptionalTensor& mask, const OptionalTensor& z, const OptionalTensor& norm, int64_t act,
    double slope, bool need_grad_input, bool need_grad_bias) {
  TORCH_CHECK_VALUE(grad_output.dim() == 4, "depthwise: grad_output must be [N, C, H', W'], got ",
                    grad_output.sizes());
  const DepthwiseShape s = shape_of(grad_output.size(0), weight, input_size, stride, padding);
  check_map(grad_output, "grad_output", s, s.oh, s.ow);
  return for_type(grad_output, "grad_output", [&](auto element) {
    const PassedGradient<decltype(element)> gradient(grad_output, mask, z, norm, act, slope);
    return backward(s, gradient, weight, input, need_grad_input, need_grad_bias);
  });
}

TORCH_LIBRARY_IMPL(wus, CPU, m) {
  m.impl("depthwise_forward", &depthwise_forward);
  m.impl("depthwise_forward_stats", &depthwise_forward_stats);
  m.impl("depthwise_backward", &depthwise_backward);
}

}  // namespace
}  // namespace wus::cpu
