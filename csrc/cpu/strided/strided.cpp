#include "cpu/strided/strided.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <utility>

#include "cpu/maps.h"
#include "cpu/strided/kernels.h"
#include "cpu/winograd/direct.h"
#include "cpu/winograd/schedule.h"

namespace wus::cpu {
namespace {

using at::Tensor;

void check_map(const Tensor& map, const char* name) {
  TORCH_CHECK_VALUE(map.dim() == 4, "strided: ", name, " must have 4 dimensions, got ", map.dim());
  TORCH_CHECK_TYPE(map.scalar_type() == at::kFloat, "strided: ", name, " must be float32, got ",
                   map.scalar_type());
  TORCH_CHECK_VALUE(map.size(1) > 0 && map.size(2) > 0 && map.size(3) > 0, "strided: ", name,
                    " must have channels and pixels, got shape ", map.sizes());
}

// The kernel's extent, 1 or 3.
int64_t check_geometry(at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding) {
  const auto pair = [](at::IntArrayRef values, int64_t value) {
    return values.size() == 2 && values[0] == value && values[1] == value;
  };
  if (pair(kernel, 3) && pair(stride, 2) && pair(padding, 1)) return 3;
  TORCH_CHECK_VALUE(
      pair(kernel, 1) && stride.size() == 2 && stride[0] > 0 && stride[1] > 0 && pair(padding, 0),
      "strided: a 3x3 kernel wants stride 2 and padding 1, a 1x1 kernel no padding; got kernel ",
      kernel, ", stride ", stride, ", padding ", padding);
  return 1;
}

int64_t planes(int64_t kernel) { return kernel == 3 ? kStridedWeights * kStridedWeights : 1; }

void check_packed(const Tensor& packed, int64_t kernel, int64_t inputs, int64_t outputs) {
  const int64_t sizes[] = {planes(kernel), plane_size(inputs, outputs)};
  TORCH_CHECK_VALUE(
      packed.scalar_type() == at::kFloat && packed.sizes() == sizes && packed.is_contiguous(),
      "strided: packed must be what strided_pack made for this layer, float32 of shape ",
      at::IntArrayRef(sizes), ", got ", packed.scalar_type(), " of shape ", packed.sizes());
}

int64_t output_extent(int64_t input, int64_t stride) { return (input - 1) / stride + 1; }

void check_weight(const Tensor& weight) {
  check_map(weight, "weight");
  const int64_t kernel = weight.size(2);
  TORCH_CHECK_VALUE((kernel == 1 || kernel == 3) && weight.size(3) == kernel,
                    "strided: weight must be [outputs, inputs, 3, 3] or [outputs, inputs, 1, 1], "
                    "got shape ",
                    weight.sizes());
}

Tensor empty_packed(const Tensor& weight, bool dgrad) {
  check_weight(weight);
  const int64_t kernel = weight.size(2);
  const int64_t inputs = weight.size(dgrad ? 0 : 1), outputs = weight.size(dgrad ? 1 : 0);
  return at::empty({planes(kernel), plane_size(inputs, outputs)},
                   weight.options().memory_format(std::nullopt));
}

WinogradInput source(const Tensor& x, int64_t padding) {
  WinogradInput in{};
  in.x = x.const_data_ptr<float>();
  in.channels = x.size(1);
  in.height = x.size(2);
  in.width = x.size(3);
  in.padding = padding;
  return in;
}

// The inverse of the weight transform in kernels.inl.
constexpr Recovery kRecovery = {kStridedWeights,
                                {{2, 0, 0, 0, 0, 0}, {0, 0, 0, 0, 0, 1}, {0, 0, 0, 0, 1, 0}}};

WinogradOutput target(Tensor& y) {
  WinogradOutput out{};
  out.y = y.mutable_data_ptr<float>();
  out.channels = y.size(1);
  out.height = y.size(2);
  out.width = y.size(3);
  return out;
}

}  // namespace

Tensor& strided_pack_(Tensor& packed, const Tensor& weight, bool dgrad) {
  check_weight(weight);
  const int64_t inputs = weight.size(dgrad ? 0 : 1), outputs = weight.size(dgrad ? 1 : 0);
  const int64_t kernel = weight.size(2);
  check_packed(packed, kernel, inputs, outputs);
  WinogradWeight w{weight.const_data_ptr<float>(), weight.stride(0), weight.stride(1),
                   weight.stride(2), weight.stride(3)};
  if (dgrad) {
    std::swap(w.output, w.input);
    w.data += (kernel - 1) * (w.y + w.x);
    w.y = -w.y;
    w.x = -w.x;
  }
  (kernel == 3 ? polyphase_pack : pointwise_pack)(w, inputs, outputs,
                                                  packed.mutable_data_ptr<float>());
  return packed;
}

Tensor strided_pack(const Tensor& weight, bool dgrad) {
  Tensor packed = empty_packed(weight, dgrad);
  return strided_pack_(packed, weight, dgrad);
}

Tensor strided_forward(const Tensor& input, const Tensor& packed, const std::optional<Tensor>& bias,
                       int64_t out_channels, at::IntArrayRef kernel, at::IntArrayRef stride,
                       at::IntArrayRef padding) {
  check_map(input, "input");
  const int64_t extent = check_geometry(kernel, stride, padding);
  check_packed(packed, extent, input.size(1), out_channels);
  if (bias) {
    TORCH_CHECK_VALUE(
        bias->dim() == 1 && bias->size(0) == out_channels && bias->scalar_type() == at::kFloat,
        "strided: bias must be float32 of shape [", out_channels, "], got ", bias->scalar_type(),
        " of shape ", bias->sizes());
  }
  const Tensor x = input.contiguous(at::MemoryFormat::ChannelsLast);
  const std::optional<Tensor> b = bias ? std::optional(bias->contiguous()) : std::nullopt;
  Tensor y = empty_map(x, out_channels, output_extent(x.size(2), stride[0]),
                       output_extent(x.size(3), stride[1]));
  WinogradOutput out = target(y);
  out.bias = b ? b->const_data_ptr<float>() : nullptr;
  const float* weight = packed.const_data_ptr<float>();
  if (extent == 1) {
    pointwise_forward(source(x, 0), out, x.size(0), {stride[0], stride[1]}, weight);
  } else if (!polyphase_forward(source(x, 1), out, x.size(0), weight)) {
    const at::NoGradGuard no_grad;
    const Tensor filter = recover_weight(packed, kRecovery, x.size(1), out_channels);
    y.copy_(at::convolution(x, filter, b, stride, padding, {1, 1}, false, {0, 0}, 1));
  }
  return y;
}

Tensor strided_dgrad(const Tensor& grad_output, const Tensor& packed, int64_t in_channels,
                     at::IntArrayRef input_size, at::IntArrayRef kernel, at::IntArrayRef stride,
                     at::IntArrayRef padding) {
  check_map(grad_output, "grad_output");
  const int64_t extent = check_geometry(kernel, stride, padding);
  check_packed(packed, extent, grad_output.size(1), in_channels);
  TORCH_CHECK_VALUE(input_size.size() == 2 && input_size[0] > 0 && input_size[1] > 0,
                    "strided: input_size must be (height, width), got ", input_size);
  TORCH_CHECK_VALUE(grad_output.size(2) == output_extent(input_size[0], stride[0]) &&
                        grad_output.size(3) == output_extent(input_size[1], stride[1]),
                    "strided: grad_output of shape ", grad_output.sizes(),
                    " does not belong to an input of size ", input_size, " and stride ", stride);
  const Tensor g = grad_output.contiguous(at::MemoryFormat::ChannelsLast);
  Tensor grad_input = empty_map(g, in_channels, input_size[0], input_size[1]);
  const float* weight = packed.const_data_ptr<float>();
  if (extent == 1) {
    pointwise_dgrad(source(g, 0), target(grad_input), g.size(0), {stride[0], stride[1]}, weight);
  } else if (!polyphase_dgrad(source(g, 0), target(grad_input), g.size(0), weight)) {
    const at::NoGradGuard no_grad;
    const Tensor filter =
        recover_weight(packed, kRecovery, g.size(1), in_channels).flip({2, 3}).transpose(0, 1);
    const int64_t left_over[] = {1 - input_size[0] % 2, 1 - input_size[1] % 2};
    grad_input.copy_(
        at::convolution(g, filter, std::nullopt, stride, padding, {1, 1}, true, left_over, 1));
  }
  return grad_input;
}

// What a packed weight will take: strided_pack of a meta tensor.
TORCH_LIBRARY_IMPL(wus, Meta, m) { m.impl("strided_pack", &empty_packed); }

TORCH_LIBRARY_IMPL(wus, CPU, m) {
  m.impl("strided_pack", &strided_pack);
  m.impl("strided_pack_", &strided_pack_);
  m.impl("strided_forward", &strided_forward);
  m.impl("strided_dgrad", &strided_dgrad);
}

}  // namespace wus::cpu
