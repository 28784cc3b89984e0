#include <ATen/core/Generator.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "cpu/elementwise/mask_kernels.h"
#include "cpu/parallel_rows.h"

namespace wus::cpu {
namespace {

// The random numbers of torch.nn.functional.dropout: the same draws from the same generator in the
// order of the input's memory, and none where it draws none.
at::Tensor draw_noise(const at::Tensor& input, double p,
                      const std::optional<at::Generator>& generator) {
  TORCH_CHECK_VALUE(p >= 0 && p <= 1, "p must be a probability between 0 and 1, got ", p);
  at::Tensor noise = at::empty_like(input);
  if (p == 0) return noise.fill_(1);
  if (p == 1) return noise.zero_();
  return noise.bernoulli_(1 - p, generator);
}

template <class T>
std::tuple<at::Tensor, at::Tensor> drop_rows(const at::Tensor& x, const at::Tensor& noise, double p,
                                             bool relu) {
  const float scale = p == 1 ? 0.f : 1.f / static_cast<float>(1 - p);
  const Rows shape(x);
  at::Tensor output = empty_rows(x);
  at::Tensor mask = empty_mask(x);
  const T *in = data<T>(x), *kept = data<T>(noise);
  T* out = mutable_data<T>(output);
  uint8_t* bits = mask.data_ptr<uint8_t>();
  for_rows(shape.rows, shape.channels, [&](int64_t begin, int64_t end) {
    const int64_t i = begin * shape.channels;
    WUS_DISPATCH(mask_kernels<T>())
        .dropout(in + i, kept + i, scale, relu, out + i, bits + begin * shape.mask_bytes(),
                 end - begin, shape.channels);
  });
  return {output, mask};
}

std::tuple<at::Tensor, at::Tensor> drop(const at::Tensor& input, double p,
                                        const std::optional<at::Generator>& generator, bool relu,
                                        const std::optional<at::Tensor>& drawn = {}) {
  return for_type(input, "input", [&](auto element) {
    using T = decltype(element);
    const at::Tensor x = as_rows<T>(input, "input");
    TORCH_CHECK_VALUE(!drawn || drawn->sizes() == input.sizes(),
                      "noise must have the input's shape ", input.sizes(), ", got ",
                      drawn->sizes());
    const at::Tensor noise = as_rows<T>(drawn ? *drawn : draw_noise(input, p, generator), "noise");
    return drop_rows<T>(x, noise, p, relu);
  });
}

std::tuple<at::Tensor, at::Tensor> dropout_mask(const at::Tensor& input, double p,
                                                std::optional<at::Generator> generator) {
  return drop(input, p, generator, false);
}

std::tuple<at::Tensor, at::Tensor> relu_dropout_mask(const at::Tensor& input, double p,
                                                     std::optional<at::Generator> generator,
                                                     const std::optional<at::Tensor>& noise) {
  return drop(input, p, generator, true, noise);
}

at::Tensor apply_mask(const at::Tensor& grad_output, const at::Tensor& mask, double scale) {
  return for_type(grad_output, "grad_output", [&](auto element) {
    using T = decltype(element);
    const at::Tensor grad = as_rows<T>(grad_output, "grad_output");
    check_mask(mask, grad);
    const Rows shape(grad);
    at::Tensor output = empty_rows(grad);
    const T* g = data<T>(grad);
    const uint8_t* bits = mask.const_data_ptr<uint8_t>();
    T* out = mutable_data<T>(output);
    for_rows(shape.rows, shape.channels, [&](int64_t begin, int64_t end) {
      const int64_t i = begin * shape.channels;
      WUS_DISPATCH(mask_kernels<T>())
          .apply(g + i, bits + begin * shape.mask_bytes(), static_cast<float>(scale), out + i,
                 end - begin, shape.channels);
    });
    return output;
  });
}

TORCH_LIBRARY_IMPL(wus, CPU, m) {
  m.impl("dropout_mask", &dropout_mask);
  m.impl("relu_dropout_mask", &relu_dropout_mask);
  m.impl("apply_mask", &apply_mask);
}

}  // namespace
}  // namespace wus::cpu
