#include "chains/library.h"

#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>

#include <utility>

namespace wus::chains {
namespace {

std::optional<uint32_t> version(const Tensor& tensor) {
  return tensor.is_inference() ? std::nullopt : std::optional<uint32_t>(tensor._version());
}

OptionalTensor as(at::ScalarType dtype, const Tensor& bias) {
  return bias.defined() ? OptionalTensor(bias.to(dtype)) : std::nullopt;
}

// wus::convolution, over a weight that gets no gradient.
Tensor skip_convolution(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                        const Library& g) {
  using Sizes = c10::SymIntArrayRef;
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("wus::convolution", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const OptionalTensor&,
                                           Sizes, Sizes, Sizes, bool, Sizes, c10::SymInt)>();
  const auto sizes = [](const Size& size) { return c10::fromIntArrayRefSlow(size); };
  const c10::SymInt none[] = {0, 0};
  return op.call(input, weight, bias, sizes(g.stride), sizes(g.padding), sizes(g.dilation), false,
                 none, g.groups);
}

}  // namespace

Tensor Library::as_it_is(const Tensor& weight, at::ScalarType dtype) const {
  const bool any = !gpu && dtype == at::kFloat;
  const bool fits = weight.scalar_type() == dtype &&
                    (any || weight.is_contiguous(at::MemoryFormat::ChannelsLast));
  return fits ? weight : Tensor();
}

Tensor Library::cast(const Tensor& weight, at::ScalarType dtype) const {
  const Tensor own = as_it_is(weight, dtype);
  return own.defined() ? own : weight.to(dtype).contiguous(at::MemoryFormat::ChannelsLast);
}

Tensor Library::alone(const Tensor& input, const Tensor& weight, const Tensor& bias,
                      const Tensor& trained) const {
  const auto dtype = input.scalar_type();
  if (trained.defined())
    return dense(
        at::conv2d(input, trained.to(dtype), as(dtype, bias), stride, padding, dilation, groups));
  return dense(skip_convolution(input, weight, as(dtype, bias), *this));
}

LibraryConvolution::LibraryConvolution(LibraryPtr library, Tensor weight)
    : Unfused(library->kernels, library->output_size),
      library_(std::move(library)),
      weight_(std::move(weight)),
      version_(version(weight_)) {}

const Tensor& LibraryConvolution::weight() const {
  TORCH_CHECK(version(weight_) == version_, "a weight of shape ", weight_.sizes(),
              " that backward needs was modified by an inplace operation after the forward pass");
  return weight_;
}

Output LibraryConvolution::forward(const Tensor& input, const Tensor& bias, const Act& act) {
  if (!library_->gpu || !bias.defined()) return Unfused::forward(input, bias, act);
  return shifted(convolve(input, {}), bias, std::nullopt, act);
}

Output LibraryConvolution::forward_add(const Tensor& input, const Tensor& bias,
                                       const Tensor& residual, const Act& act) {
  if (!library_->gpu || !bias.defined()) return Unfused::forward_add(input, bias, residual, act);
  return shifted(convolve(input, {}), bias, residual, act);
}

Normed LibraryConvolution::forward_norm(const Tensor& input, const Tensor& bias,
                                        const BatchNorm& norm) {
  if (!library_->gpu || !bias.defined()) return Unfused::forward_norm(input, bias, norm);
  return normed(kernels, convolve(input, {}), norm, single(bias));
}

Tensor LibraryConvolution::dgrad(const Tensor& grad) {
  const Library& g = *library_;
  std::array<int64_t, 2> left_over;
  for (const int i : {0, 1}) {
    left_over[i] = g.input_size[i] - (g.output_size[i] - 1) * g.stride[i] + 2 * g.padding[i] -
                   g.dilation[i] * (g.kernel_size[i] - 1) - 1;
  }
  // Of an output gradient of one pixel oneDNN makes an input gradient in the weight's layout.
  return dense(at::convolution(grad, weight(), std::nullopt, g.stride, g.padding, g.dilation, true,
                               left_over, g.groups));
}

Tensor LibraryConvolution::wgrad(const Tensor& grad, const Trained& trained) {
  const Library& g = *library_;
  return std::get<1>(at::convolution_backward(dense(grad), trained.input, weight(), std::nullopt,
                                              g.stride, g.padding, g.dilation, false, {0, 0},
                                              g.groups, {false, true, false}));
}

Tensor LibraryConvolution::convolve(const Tensor& input, const Tensor& bias) {
  const Library& g = *library_;
  // With one channel in, input and weight are of both layouts, and oneDNN chooses the other.
  return dense(at::conv2d(input, weight(), as(input.scalar_type(), bias), g.stride, g.padding,
                          g.dilation, g.groups));
}

Output LibraryConvolution::shifted(const Tensor& output, const Tensor& bias,
                                   const OptionalTensor& residual, const Act& act) const {
  auto [shifted, mask] = kernels.apply.call(output, std::nullopt, single(bias), residual, act.kind,
                                            act.slope, act.pool, /*need_mask=*/true);
  return {shifted, act.none() ? Tensor() : mask};
}

}  // namespace wus::chains
