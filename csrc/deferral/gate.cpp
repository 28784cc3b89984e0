#include "deferral/gate.h"

#include <algorithm>
#include <utility>

#include "autograd/gate.h"
#include "deferral/deferred.h"
#include "deferral/session.h"

namespace wus::deferral {
namespace {

using Through = c10::impl::ExcludeDispatchKeyGuard;

// Whether operators of ours may stand for torch's.
bool undisturbed() {
  const Session* session = Session::current();
  return session != nullptr && session->undisturbed() && at::GradMode::is_enabled();
}

// An image that our kernels take, in a layout that leaves no strides open.
bool is_image(const at::Tensor& t) {
  return t.dim() == 4 && t.device().is_cpu() && is_plain(t) && t.size(1) > 1 && t.size(2) > 1 &&
         t.size(3) > 1 && (t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16) &&
         t.is_contiguous(at::MemoryFormat::ChannelsLast);
}

bool is_gate_of(const at::Tensor& gate, const at::Tensor& image) {
  return gate.dim() == 4 && gate.size(0) == image.size(0) && gate.size(1) == image.size(1) &&
         gate.size(2) == 1 && gate.size(3) == 1 && gate.scalar_type() == image.scalar_type() &&
         gate.device().is_cpu() && is_plain(gate);
}

// Computes a chain's output. Whoever looks at a gradient expects memory of its own behind it.
bool settles_unobserved(const at::Tensor& tensor) {
  Deferred* deferred = as_deferred(tensor);
  if (deferred == nullptr || deferred->is_observed()) return false;
  deferred->settle();
  return true;
}

}  // namespace

std::optional<at::Tensor> times_gate(const at::Tensor& self, const at::Tensor& other) {
  if (!undisturbed() || !(self.requires_grad() || other.requires_grad())) return std::nullopt;
  for (const auto* tensor : {&self, &other}) {
    if (Deferred* deferred = as_deferred(*tensor)) deferred->settle();
    Session::current()->before_use(*tensor, false);
  }
  Through through(kKey);
  if (is_image(self) && is_gate_of(other, self)) return gated(self, other);
  if (is_image(other) && is_gate_of(self, other)) return gated(other, self);
  return std::nullopt;
}

std::optional<at::Tensor> mean_of_pixels(const at::Tensor& input, at::OptionalIntArrayRef dims,
                                         bool keepdim) {
  if (!undisturbed() || !input.requires_grad() || input.dim() != 4 || !dims || dims->size() != 2)
    return std::nullopt;
  const auto [low, high] = std::minmax({(dims->at(0) + 4) % 4, (dims->at(1) + 4) % 4});
  if (low != 2 || high != 3 || !settles_unobserved(input)) return std::nullopt;
  Through through(kKey);
  return is_image(input) ? std::optional(pixel_mean(input, keepdim)) : std::nullopt;
}

std::optional<at::Tensor> average_of_pixels(const at::Tensor& input, at::IntArrayRef output_size) {
  const bool one =
      std::all_of(output_size.begin(), output_size.end(), [](auto n) { return n == 1; });
  if (!undisturbed() || !input.requires_grad() || input.dim() != 4 || output_size.size() > 2 ||
      output_size.empty() || !one || !settles_unobserved(input))
    return std::nullopt;
  Through through(kKey);
  return is_image(input) ? std::optional(pixel_average(input)) : std::nullopt;
}

}  // namespace wus::deferral
