#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>

#include <memory>
#include <utility>

#include "chains/library.h"

namespace wus::chains {
namespace {

// wus::linear, over a weight that gets no gradient.
Tensor skip_linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("wus::linear", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const OptionalTensor&)>();
  return op.call(input, weight, bias);
}

class OnWeight final : public Unfused {
 public:
  OnWeight(std::shared_ptr<const Linear> own, Tensor weight)
      : Unfused(own->kernels, {1, 1}), own_(std::move(own)), weight_(std::move(weight)) {}

  const char* name() const override { return own_->name(); }
  Tensor dgrad(const Tensor& grad) override { return at::matmul(grad, weight_.get()); }
  Tensor wgrad(const Tensor& grad, const Trained& trained) override {
    return at::matmul(grad.t(), trained.input);
  }
  OptionalTensor alone(const Tensor& input, const Tensor& bias, const Tensor& trained) override {
    return own_->alone(input, weight_.unchecked(), bias, trained);
  }

 protected:
  Tensor convolve(const Tensor& input, const Tensor& bias) override {
    return at::linear(input, weight_.get(), as(input.scalar_type(), bias));
  }

 private:
  std::shared_ptr<const Linear> own_;
  Unchanged weight_;
};

}  // namespace

AlgorithmPtr Linear::on(Tensor weight) const {
  return std::make_shared<OnWeight>(std::static_pointer_cast<const Linear>(shared_from_this()),
                                    std::move(weight));
}

Tensor Linear::alone(const Tensor& input, const Tensor& weight, const Tensor& bias,
                     const Tensor& trained) const {
  const auto dtype = input.scalar_type();
  if (trained.defined()) return at::linear(input, trained.to(dtype), as(dtype, bias));
  return skip_linear(input, weight, as(dtype, bias));
}

}  // namespace wus::chains
