#include "deferral/gate.h"

#include <ATen/WrapDimUtils.h>

#include <algorithm>

#include "autograd/gate.h"
#include "deferral/deferred.h"

namespace wus::deferral {
namespace {

// An image that our kernels take, in a layout that leaves no strides open.
bool is_image(const at::Tensor& t) {
  return is_plain(t) && t.dim() == 4 && t.device().is_cpu() && t.size(1) > 1 && t.size(2) > 1 &&
         t.size(3) > 1 && (t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16) &&
         t.is_contiguous(at::MemoryFormat::ChannelsLast);
}

bool is_gate_of(const at::Tensor& gate, const at::Tensor& image) {
  return is_plain(gate) && gate.dim() == 4 && gate.size(0) == image.size(0) &&
         gate.size(1) == image.size(1) && gate.size(2) == 1 && gate.size(3) == 1 &&
         gate.scalar_type() == image.scalar_type() && gate.device().is_cpu();
}

std::optional<at::Tensor> mean(const at::Tensor& image, GlobalMean kind) {
  if (!image.requires_grad() || !is_image(image)) return std::nullopt;
  return global_mean(image, kind);
}

}  // namespace

std::optional<at::Tensor> times_gate(const at::Tensor& self, const at::Tensor& other) {
  if (!self.requires_grad() && !other.requires_grad()) return std::nullopt;
  if (is_image(self) && is_gate_of(other, self)) return gated(self, other);
  if (is_image(other) && is_gate_of(self, other)) return gated(other, self);
  return std::nullopt;
}

std::optional<at::Tensor> mean_over_pixels(const at::Tensor& input, at::OptionalIntArrayRef dims,
                                           bool keepdim) {
  if (input.dim() != 4 || !dims || dims->size() != 2) return std::nullopt;
  const auto [low, high] =
      std::minmax({at::maybe_wrap_dim(dims->at(0), 4), at::maybe_wrap_dim(dims->at(1), 4)});
  if (low != 2 || high != 3) return std::nullopt;
  return mean(input, keepdim ? GlobalMean::kMeanKeepDim : GlobalMean::kMean);
}

std::optional<at::Tensor> pooled_to_one(const at::Tensor& input,
                                        at::OptionalIntArrayRef output_size) {
  if (input.dim() != 4 || !output_size || !output_size->equals({1, 1})) return std::nullopt;
  return mean(input, GlobalMean::kPool);
}

}  // namespace wus::deferral
