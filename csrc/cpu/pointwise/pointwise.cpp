// 1x1 convolution with unit stride, one group, float32, maps channels_last. Schemas, shapes and
// layouts: see ops.cpp.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "cpu/activation/gradient.h"
#include "cpu/batch_norm/statistics.h"
#include "cpu/maps.h"
#include "cpu/parallel_rows.h"
#include "cpu/pointwise/schedule.h"

namespace wus::cpu {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

void check_weight(const Tensor& weight) {
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(0) > 0 && weight.size(1) > 0 &&
                        weight.size(2) == 1 && weight.size(3) == 1,
                    "pointwise: weight must be [outputs, inputs, 1, 1], got shape ",
                    weight.sizes());
}

Tensor empty_packed(const Tensor& weight, bool dgrad) {
  check_weight(weight);
  const int64_t inputs = weight.size(dgrad ? 0 : 1), outputs = weight.size(dgrad ? 1 : 0);
  return at::empty({pointwise_packed_size(inputs, outputs)},
                   weight.options().memory_format(std::nullopt));
}

Tensor& pointwise_pack_(Tensor& packed, const Tensor& weight, bool dgrad) {
  check_weight(weight);
  check_float(weight, "pointwise: weight");
  check_float(packed, "pointwise: packed");
  const int64_t inputs = weight.size(dgrad ? 0 : 1), outputs = weight.size(dgrad ? 1 : 0);
  const int64_t sizes[] = {pointwise_packed_size(inputs, outputs)};
  TORCH_CHECK_VALUE(packed.sizes() == sizes && packed.is_contiguous(),
                    "pointwise: packed must be contiguous, of shape ", at::IntArrayRef(sizes),
                    ", got ", packed.sizes());
  pack_pointwise(weight.const_data_ptr<float>(), weight.stride(dgrad ? 1 : 0),
                 weight.stride(dgrad ? 0 : 1), inputs, outputs, packed.mutable_data_ptr<float>());
  return packed;
}

Tensor pointwise_pack(const Tensor& weight, bool dgrad) {
  Tensor packed = empty_packed(weight, dgrad);
  return pointwise_pack_(packed, weight, dgrad);
}

void check_map(const Tensor& map, const char* name) {
  TORCH_CHECK_VALUE(map.dim() == 4 && map.size(1) > 0, "pointwise: ", name,
                    " must be [N, C, H, W] with channels, got shape ", map.sizes());
}

void check_packed(const Tensor& packed, int64_t inputs, int64_t outputs) {
  const int64_t size = pointwise_packed_size(inputs, outputs);
  TORCH_CHECK_VALUE(packed.scalar_type() == at::kFloat && packed.device().is_cpu() &&
                        packed.dim() == 1 && packed.size(0) == size && packed.is_contiguous(),
                    "pointwise: packed must be what pointwise_pack made for this layer, float32 of "
                    "shape [",
                    size, "], got ", packed.scalar_type(), " of shape ", packed.sizes());
}

struct Forward {
  Tensor input, packed, bias, output;
  PointwiseForward work{};

  Forward(const Tensor& x, const Tensor& packed, const OptionalTensor& b, int64_t outputs)
      : input(as_rows(x, "input")), packed(packed) {
    check_map(x, "input");
    check_packed(packed, x.size(1), outputs);
    bias = per_channel(b, "bias", outputs);
    output = empty_map(input, outputs, x.size(2), x.size(3));
    work.rows = wus::Rows(input).rows;
    work.inputs = x.size(1);
    work.outputs = outputs;
    work.input = data(input);
    work.packed = data(packed);
    work.bias = data(bias);
    work.output = output.mutable_data_ptr<float>();
  }
};

std::tuple<Tensor, Tensor> pointwise_forward(const Tensor& input, const Tensor& packed,
                                             const OptionalTensor& bias, int64_t out_channels,
                                             int64_t act, double slope) {
  check_act(act);
  Forward forward(input, packed, bias, out_channels);
  const Tensor saved = forward.work.following.set(forward.output, act, slope);
  run_pointwise(forward.work, false);
  return {forward.output, saved};
}

std::tuple<Tensor, Tensor, Tensor> pointwise_forward_stats(const Tensor& input,
                                                           const Tensor& packed,
                                                           const OptionalTensor& bias,
                                                           int64_t out_channels) {
  const Forward forward(input, packed, bias, out_channels);
  const auto [mean, var] = statistics(run_pointwise(forward.work, true), forward.work.rows);
  return {forward.output, mean, var};
}

std::tuple<Tensor, Tensor, Tensor> pointwise_backward(
    const Tensor& grad_output, const OptionalTensor& packed, const OptionalTensor& input,
    int64_t in_channels, const OptionalTensor& mask, const OptionalTensor& z,
    const OptionalTensor& norm, int64_t act, double slope, bool need_grad_bias,
    bool channels_last) {
  check_map(grad_output, "grad_output");
  const PassedGradient<float> gradient(grad_output, mask, z, norm, act, slope);
  PointwiseBackward work{};
  work.rows = gradient.rows;
  work.inputs = in_channels;
  work.outputs = grad_output.size(1);
  work.grad = gradient.op;
  work.norm = gradient.norm();
  Tensor grad_input = nothing(gradient.grad), grad_weight = nothing(gradient.grad);
  if (packed) {
    check_packed(*packed, work.outputs, in_channels);
    grad_input = empty_map(gradient.grad, in_channels, grad_output.size(2), grad_output.size(3));
    work.packed = data(*packed);
    work.grad_input = grad_input.mutable_data_ptr<float>();
  }
  Tensor source;
  if (input) {
    const int64_t sizes[] = {grad_output.size(0), in_channels, grad_output.size(2),
                             grad_output.size(3)};
    TORCH_CHECK_VALUE(input->sizes() == sizes, "pointwise: input must have shape ",
                      at::IntArrayRef(sizes), ", got ", input->sizes());
    source = as_rows(*input, "input");
    work.input = data(source);
    const auto format =
        channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
    grad_weight =
        at::empty({work.outputs, in_channels, 1, 1}, gradient.grad.options().memory_format(format));
    work.grad_weight = grad_weight.mutable_data_ptr<float>();
  }
  if (work.grad_input || work.grad_weight) run_pointwise_backward(work);
  return {grad_input, grad_weight, need_grad_bias ? gradient.sum() : nothing(grad_input)};
}

// What a packed weight will take, before any is made: pointwise_pack of a meta tensor.
TORCH_LIBRARY_IMPL(wus, Meta, m) { m.impl("pointwise_pack", &empty_packed); }

TORCH_LIBRARY_IMPL(wus, CPU, m) {
  m.impl("pointwise_pack", &pointwise_pack);
  m.impl("pointwise_pack_", &pointwise_pack_);
  m.impl("pointwise_forward", &pointwise_forward);
  m.impl("pointwise_forward_stats", &pointwise_forward_stats);
  m.impl("pointwise_backward", &pointwise_backward);
}

}  // namespace
}  // namespace wus::cpu
