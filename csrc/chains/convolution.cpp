#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>

#include <memory>
#include <utility>

#include "chains/library.h"

namespace wus::chains {
namespace {

// wus::convolution, over a weight that gets no gradient.
Tensor skip_convolution(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                        const Convolution& own) {
  using Sizes = c10::SymIntArrayRef;
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("wus::convolution", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const OptionalTensor&,
                                           Sizes, Sizes, Sizes, bool, Sizes, c10::SymInt)>();
  const auto sizes = [](const Size& size) { return c10::fromIntArrayRefSlow(size); };
  const auto& [_, stride, padding, dilation] = own.window;
  const c10::SymInt none[] = {0, 0};
  return op.call(input, weight, bias, sizes(stride), sizes(padding), sizes(dilation), false, none,
                 own.groups);
}

class OnWeight final : public Unfused {
 public:
  OnWeight(std::shared_ptr<const Convolution> own, Tensor weight)
      : Unfused(own->kernels, own->output_size), own_(std::move(own)), weight_(std::move(weight)) {}

  const char* name() const override { return own_->name(); }

  // On a GPU, where anything follows, the bias is not cuDNN's: one pass of ours adds it and all of
  // that. It may be float32 behind a convolution in low precision, so that it is not cast.
  Output forward(const Tensor& input, const Tensor& bias, const Act& act) override {
    if (!own_->gpu || !bias.defined()) return Unfused::forward(input, bias, act);
    return shifted(convolve(input, {}), bias, std::nullopt, act);
  }

  Output forward_add(const Tensor& input, const Tensor& bias, const Tensor& residual,
                     const Act& act) override {
    if (!own_->gpu || !bias.defined()) return Unfused::forward_add(input, bias, residual, act);
    return shifted(convolve(input, {}), bias, residual, act);
  }

  Normed forward_norm(const Tensor& input, const Tensor& bias, const BatchNorm& norm) override {
    if (!own_->gpu || !bias.defined()) return Unfused::forward_norm(input, bias, norm);
    return normed(kernels, convolve(input, {}), norm, single(bias));
  }

  Tensor dgrad(const Tensor& grad) override {
    const auto& [kernel_size, stride, padding, dilation] = own_->window;
    Size left_over;
    for (const int i : {0, 1}) {
      left_over[i] = own_->input_size[i] - (own_->output_size[i] - 1) * stride[i] + 2 * padding[i] -
                     dilation[i] * (kernel_size[i] - 1) - 1;
    }
    // Of an output gradient of one pixel oneDNN makes an input gradient in the weight's layout.
    return dense(at::convolution(grad, weight_.get(), std::nullopt, stride, padding, dilation, true,
                                 left_over, own_->groups));
  }

  Tensor wgrad(const Tensor& grad, const Trained& trained) override {
    const auto& [_, stride, padding, dilation] = own_->window;
    return std::get<1>(at::convolution_backward(dense(grad), trained.input, weight_.get(),
                                                std::nullopt, stride, padding, dilation, false,
                                                {0, 0}, own_->groups, {false, true, false}));
  }

  OptionalTensor alone(const Tensor& input, const Tensor& bias, const Tensor& trained) override {
    return own_->alone(input, weight_.unchecked(), bias, trained);
  }

 protected:
  Tensor convolve(const Tensor& input, const Tensor& bias) override {
    const auto& [_, stride, padding, dilation] = own_->window;
    // With one channel in, input and weight are of both layouts, and oneDNN chooses the other.
    return dense(at::conv2d(input, weight_.get(), as(input.scalar_type(), bias), stride, padding,
                            dilation, own_->groups));
  }

 private:
  Output shifted(const Tensor& output, const Tensor& bias, const OptionalTensor& residual,
                 const Act& act) const {
    auto [shifted, mask] = kernels.apply.call(output, std::nullopt, single(bias), residual,
                                              act.kind, act.slope, act.pool, /*need_mask=*/true);
    return {shifted, act.none() ? Tensor() : mask};
  }

  std::shared_ptr<const Convolution> own_;
  Unchanged weight_;
};

}  // namespace

bool Convolution::takes(const Tensor& weight, at::ScalarType dtype) const {
  const bool any = !gpu && dtype == at::kFloat;
  return weight.scalar_type() == dtype &&
         (any || weight.is_contiguous(at::MemoryFormat::ChannelsLast));
}

Tensor Convolution::cast(const Tensor& weight, at::ScalarType dtype) const {
  if (takes(weight, dtype)) return weight;
  return weight.to(dtype).contiguous(at::MemoryFormat::ChannelsLast);
}

AlgorithmPtr Convolution::on(Tensor weight) const {
  return std::make_shared<OnWeight>(std::static_pointer_cast<const Convolution>(shared_from_this()),
                                    std::move(weight));
}

Tensor Convolution::alone(const Tensor& input, const Tensor& weight, const Tensor& bias,
                          const Tensor& trained) const {
  const auto dtype = input.scalar_type();
  if (trained.defined())
    return dense(at::conv2d(input, trained.to(dtype), as(dtype, bias), window.stride,
                            window.padding, window.dilation, groups));
  return dense(skip_convolution(input, weight, as(dtype, bias), *this));
}

}  // namespace wus::chains
