#include "chains/library.h"

#include <utility>

namespace wus::chains {
namespace {

std::optional<uint32_t> version(const Tensor& tensor) {
  return tensor.is_inference() ? std::nullopt : std::optional<uint32_t>(tensor._version());
}

}  // namespace

Unchanged::Unchanged(Tensor weight) : weight_(std::move(weight)), version_(version(weight_)) {}

const Tensor& Unchanged::get() const {
  TORCH_CHECK(version(weight_) == version_, "a weight of shape ", weight_.sizes(),
              " that backward needs was modified by an inplace operation after the forward pass");
  return weight_;
}

OptionalTensor as(at::ScalarType dtype, const Tensor& bias) {
  return bias.defined() ? OptionalTensor(bias.to(dtype)) : std::nullopt;
}

}  // namespace wus::chains
