#include "cpu/winograd/winograd.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "cpu/gemm/kernels.h"
#include "cpu/maps.h"
#include "cpu/winograd/direct.h"
#include "cpu/winograd/schedule.h"

namespace wus::cpu {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

SchemeInfo scheme_info(int64_t scheme) {
  switch (scheme) {
    case 0:
      return {WinogradScheme::z2, 2, 9};
    case 2:
      return {WinogradScheme::f2, 2, 16};
    case 4:
      return {WinogradScheme::f4, 4, 36};
    default:
      TORCH_CHECK_VALUE(false, "winograd: scheme must be 0, 2 or 4, got ", scheme);
  }
}

void check_map(const Tensor& map, const char* name) {
  TORCH_CHECK_VALUE(map.dim() == 4, "winograd: ", name, " must have 4 dimensions, got ", map.dim());
  TORCH_CHECK_TYPE(map.scalar_type() == at::kFloat, "winograd: ", name, " must be float32, got ",
                   map.scalar_type());
  TORCH_CHECK_VALUE(map.size(1) > 0 && map.size(2) > 0 && map.size(3) > 0, "winograd: ", name,
                    " must have channels and pixels, got shape ", map.sizes());
}

void check_sizes(const OptionalTensor& tensor, const char* name, at::ScalarType dtype,
                 at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(tensor && tensor->sizes() == sizes, "winograd: ", name, " must have shape ",
                    sizes, ", got ", tensor ? tensor->sizes() : at::IntArrayRef{});
  TORCH_CHECK_TYPE(tensor->scalar_type() == dtype, "winograd: ", name, " must be ", dtype, ", got ",
                   tensor->scalar_type());
}

void check_packed(const Tensor& packed, const SchemeInfo& scheme, int64_t inputs, int64_t outputs) {
  check_sizes(packed, "packed", at::kFloat, {scheme.frequencies, plane_size(inputs, outputs)});
  TORCH_CHECK_VALUE(packed.is_contiguous(), "winograd: packed must be contiguous");
}

void check_geometry(int64_t scheme, int64_t height, int64_t width, int64_t padding) {
  TORCH_CHECK_VALUE(padding >= 0 && padding <= 2, "winograd: padding must be 0, 1 or 2, got ",
                    padding);
  TORCH_CHECK_VALUE(height + 2 * padding >= 3 && width + 2 * padding >= 3, "winograd: an input of ",
                    height, "x", width, " with padding ", padding,
                    " is smaller than the 3x3 kernel");
  TORCH_CHECK_VALUE(scheme != 0 || (padding == 1 && height <= 2 && width <= 2),
                    "winograd: scheme 0 wants at most 2x2 pixels and padding 1, got ", height, "x",
                    width, " and padding ", padding);
}

Tensor empty_pack(const Tensor& weight, bool dgrad, int64_t scheme) {
  const int64_t inputs = weight.size(dgrad ? 0 : 1), outputs = weight.size(dgrad ? 1 : 0);
  return at::empty({scheme_info(scheme).frequencies, plane_size(inputs, outputs)},
                   weight.options());
}

// The gradient of a convolution's output as a prologue reads it; checks what belongs to it.
struct Gradient {
  Gradient(const Tensor& grad_output, const OptionalTensor& mask, int64_t images,
           at::IntArrayRef input_size, int64_t padding, int64_t prologue, const OptionalTensor& z,
           const OptionalTensor& batch_norm);

  WinogradSource source;
  WinogradInput in{};  // without padding and tiles
  Tensor map;

 private:
  Tensor mask_, z_, vectors_;
};

Gradient::Gradient(const Tensor& grad_output, const OptionalTensor& mask, int64_t images,
                   at::IntArrayRef input_size, int64_t padding, int64_t prologue,
                   const OptionalTensor& z, const OptionalTensor& batch_norm) {
  TORCH_CHECK_VALUE(prologue >= 0 && prologue < 7, "winograd: prologue must be 0 to 6, got ",
                    prologue);
  constexpr WinogradSource kSources[] = {WinogradSource::plain,   WinogradSource::plain,
                                         WinogradSource::bits,    WinogradSource::codes,
                                         WinogradSource::bn,      WinogradSource::bn_bits,
                                         WinogradSource::bn_codes};
  source = kSources[prologue];
  const bool pooled = source == WinogradSource::codes || source == WinogradSource::bn_codes;
  const bool bits = source == WinogradSource::bits || source == WinogradSource::bn_bits;
  const bool normalized = prologue >= 4;

  const int64_t channels = grad_output.size(1);
  const int64_t height = input_size[0] + 2 * padding - 2;
  const int64_t width = input_size[1] + 2 * padding - 2;
  const int64_t divisor = pooled ? 2 : 1;
  check_sizes(grad_output, "grad_output", at::kFloat,
              {images, channels, height / divisor, width / divisor});
  if (pooled) check_sizes(mask, "mask", at::kByte, {images, height / 2, width / 2, channels});
  if (bits) check_sizes(mask, "mask", at::kByte, {images, height, width, divide_up(channels, 8)});
  if (normalized) {
    check_sizes(z, "z", at::kFloat, {images, channels, height, width});
    check_sizes(batch_norm, "batch_norm", at::kFloat, {3, channels});
  }

  map = grad_output.contiguous(at::MemoryFormat::ChannelsLast);
  in.x = map.const_data_ptr<float>();
  if (pooled || bits) {
    mask_ = mask->contiguous();
    in.mask = mask_.const_data_ptr<uint8_t>();
  }
  if (normalized) {
    z_ = z->contiguous(at::MemoryFormat::ChannelsLast);
    vectors_ = batch_norm->contiguous();
    in.z = z_.const_data_ptr<float>();
    in.a = vectors_.const_data_ptr<float>();
    in.b = in.a + channels;
    in.c = in.b + channels;
  }
  in.height = height;
  in.width = width;
  in.channels = channels;
}

}  // namespace

Tensor& winograd_pack_(Tensor& packed, const Tensor& weight, bool dgrad, int64_t scheme) {
  check_map(weight, "weight");
  TORCH_CHECK_VALUE(weight.size(2) == 3 && weight.size(3) == 3,
                    "winograd: weight must be [outputs, inputs, 3, 3], got shape ", weight.sizes());
  const SchemeInfo info = scheme_info(scheme);
  const int64_t inputs = weight.size(dgrad ? 0 : 1), outputs = weight.size(dgrad ? 1 : 0);
  check_packed(packed, info, inputs, outputs);
  WinogradWeight w{weight.const_data_ptr<float>(), weight.stride(0), weight.stride(1),
                   weight.stride(2), weight.stride(3)};
  if (dgrad) {
    std::swap(w.output, w.input);
    w.data += 2 * (w.y + w.x);
    w.y = -w.y;
    w.x = -w.x;
  }

  const auto kernel = WUS_DISPATCH(winograd_kernels).weight[static_cast<int>(info.kernel)];
  const int64_t panel = WUS_DISPATCH(gemm_kernels).panel, panels = divide_up(outputs, panel);
  const int64_t plane = plane_size(inputs, outputs);
  float* data = packed.mutable_data_ptr<float>();
  for (int64_t f = 0; f < info.frequencies; ++f) {
    std::fill_n(data + (f + 1) * plane - panel, panel, 0.f);
  }
  constexpr int64_t kInputs = 64;
  const int64_t parts = divide_up(inputs, kInputs);
  at::parallel_for(0, panels * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = i / parts * panel, first = i % parts * kInputs;
      WinogradWeight part = w;
      part.data += column * w.output;
      kernel(part, std::min(panel, outputs - column), first, std::min(inputs, first + kInputs),
             data + column * inputs, plane);
    }
  });
  return packed;
}

Tensor winograd_pack(const Tensor& weight, bool dgrad, int64_t scheme) {
  check_map(weight, "weight");
  Tensor packed = empty_pack(weight, dgrad, scheme);
  return winograd_pack_(packed, weight, dgrad, scheme);
}

std::tuple<Tensor, Tensor> winograd_forward(const Tensor& input, const Tensor& packed,
                                            const OptionalTensor& bias, int64_t out_channels,
                                            int64_t padding, int64_t scheme, int64_t epilogue) {
  check_map(input, "input");
  const SchemeInfo info = scheme_info(scheme);
  const int64_t images = input.size(0), channels = input.size(1);
  check_geometry(scheme, input.size(2), input.size(3), padding);
  check_packed(packed, info, channels, out_channels);
  TORCH_CHECK_VALUE(epilogue >= 0 && epilogue < kWinogradEpilogues,
                    "winograd: epilogue must be 0 to 3, got ", epilogue);
  if (bias) check_sizes(bias, "bias", at::kFloat, {out_channels});
  const int64_t height = input.size(2) + 2 * padding - 2, width = input.size(3) + 2 * padding - 2;
  const auto kind = static_cast<WinogradEpilogue>(epilogue);
  const bool pool = kind == WinogradEpilogue::pool;
  TORCH_CHECK_VALUE(!pool || (height >= 2 && width >= 2), "winograd: an output of ", height, "x",
                    width, " is too small to pool");

  const Tensor x = input.contiguous(at::MemoryFormat::ChannelsLast);
  const OptionalTensor b = bias ? OptionalTensor(bias->contiguous()) : std::nullopt;
  Tensor y = pool ? empty_map(x, out_channels, height / 2, width / 2)
                  : empty_map(x, out_channels, height, width);
  const auto bytes = x.options().dtype(at::kByte);
  Tensor mask;
  if (pool) mask = at::empty({images, height / 2, width / 2, out_channels}, bytes);
  if (kind == WinogradEpilogue::relu) {
    mask = at::empty({images, height, width, divide_up(out_channels, 8)}, bytes);
  }

  Convolution conv{};
  conv.scheme = info;
  conv.source = WinogradSource::plain;
  conv.epilogue = kind;
  conv.packed = packed.const_data_ptr<float>();
  conv.in.x = x.const_data_ptr<float>();
  conv.in.height = x.size(2);
  conv.in.width = x.size(3);
  conv.in.channels = channels;
  conv.in.padding = padding;
  conv.out.y = y.mutable_data_ptr<float>();
  conv.out.mask = mask.defined() ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  conv.out.bias = b ? b->const_data_ptr<float>() : nullptr;
  conv.out.height = height;
  conv.out.width = width;
  conv.out.channels = out_channels;
  const Outcome outcome =
      run_winograd(conv, images, false, x.options().memory_format(std::nullopt));
  if (!outcome.trusted) return convolve_directly(conv, packed, b, images);
  if (mask.defined()) return {y, mask};
  return {y, kind == WinogradEpilogue::stats ? outcome.sums : at::empty({0}, bytes)};
}

std::tuple<Tensor, Tensor> winograd_dgrad(const Tensor& grad_output, const Tensor& packed,
                                          const OptionalTensor& mask, int64_t in_channels,
                                          at::IntArrayRef input_size, int64_t padding,
                                          int64_t scheme, int64_t prologue, const OptionalTensor& z,
                                          const OptionalTensor& batch_norm) {
  check_map(grad_output, "grad_output");
  TORCH_CHECK_VALUE(input_size.size() == 2, "winograd: input_size must be (height, width), got ",
                    input_size);
  const SchemeInfo info = scheme_info(scheme);
  check_geometry(scheme, input_size[0], input_size[1], padding);
  check_packed(packed, info, grad_output.size(1), in_channels);
  const Gradient gradient(grad_output, mask, grad_output.size(0), input_size, padding, prologue, z,
                          batch_norm);
  Tensor grad_input = empty_map(gradient.map, in_channels, input_size[0], input_size[1]);

  Convolution conv{};
  conv.scheme = info;
  conv.source = gradient.source;
  conv.epilogue = WinogradEpilogue::none;
  conv.packed = packed.const_data_ptr<float>();
  conv.in = gradient.in;
  conv.in.padding = 2 - padding;
  conv.out.y = grad_input.mutable_data_ptr<float>();
  conv.out.height = input_size[0];
  conv.out.width = input_size[1];
  conv.out.channels = in_channels;
  const bool want_sums = prologue >= 1 && prologue <= 3;
  const int64_t images = grad_output.size(0);
  const Outcome outcome = run_winograd(conv, images, want_sums, gradient.map.options());
  if (!outcome.trusted) {
    grad_input = std::get<0>(convolve_directly(conv, packed, std::nullopt, images));
  }
  return {grad_input, outcome.sums};
}

Tensor winograd_wgrad(const Tensor& grad_output, const Tensor& input, const OptionalTensor& mask,
                      int64_t padding, int64_t scheme, int64_t prologue, const OptionalTensor& z,
                      const OptionalTensor& batch_norm, bool channels_last) {
  check_map(grad_output, "grad_output");
  check_map(input, "input");
  const int64_t images = input.size(0), inputs = input.size(1), outputs = grad_output.size(1);
  check_geometry(scheme, input.size(2), input.size(3), padding);
  const Gradient gradient(grad_output, mask, images, input.sizes().slice(2), padding, prologue, z,
                          batch_norm);
  const Tensor x = input.contiguous(at::MemoryFormat::ChannelsLast);
  Tensor weight =
      at::empty({outputs, inputs, 3, 3},
                x.options().memory_format(channels_last ? at::MemoryFormat::ChannelsLast
                                                        : at::MemoryFormat::Contiguous));
  if (images == 0) return weight.zero_();

  WeightGradient work{};
  work.scheme = scheme_info(scheme);
  work.source = gradient.source;
  work.grad = gradient.in;
  work.input.x = x.const_data_ptr<float>();
  work.input.height = x.size(2);
  work.input.width = x.size(3);
  work.input.channels = inputs;
  work.input.padding = padding;
  work.input.tile_rows = work.grad.tile_rows = divide_up(work.grad.height, work.scheme.tile);
  work.input.tile_cols = work.grad.tile_cols = divide_up(work.grad.width, work.scheme.tile);
  work.weight = {weight.mutable_data_ptr<float>(), 9 * inputs, 1, 3 * inputs, inputs};
  if (!channels_last) work.weight = {work.weight.data, 9 * inputs, 9, 3, 1};
  if (!run_winograd_wgrad(work, images * work.grad.tile_rows * work.grad.tile_cols)) {
    weight.copy_(weigh_directly(work, x, padding));
  }
  return weight;
}

// What a packed weight will take, before any is made: winograd_pack of a meta tensor.
TORCH_LIBRARY_IMPL(wus, Meta, m) { m.impl("winograd_pack", &empty_pack); }

TORCH_LIBRARY_IMPL(wus, CPU, m) {
  m.impl("winograd_pack", &winograd_pack);
  m.impl("winograd_pack_", &winograd_pack_);
  m.impl("winograd_forward", &winograd_forward);
  m.impl("winograd_dgrad", &winograd_dgrad);
  m.impl("winograd_wgrad", &winograd_wgrad);
}

}  // namespace wus::cpu
