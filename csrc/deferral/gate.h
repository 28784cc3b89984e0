#pragma once
// Squeeze-and-excitation between chains, of tensors that are computed: means of maps, and maps
// times a gate; nothing where torch's own operator must run.
#include <ATen/core/Tensor.h>

#include <optional>

namespace wus::deferral {

// self * other, of which one is a gate [N, C, 1, 1] of the other, [N, C, H, W].
std::optional<at::Tensor> times_gate(const at::Tensor& self, const at::Tensor& other);

// The mean over H and W.
std::optional<at::Tensor> mean_over_pixels(const at::Tensor& input, at::OptionalIntArrayRef dims,
                                           bool keepdim);
// The same as adaptive_avg_pool2d gives it.
std::optional<at::Tensor> pooled_to_one(const at::Tensor& input,
                                        at::OptionalIntArrayRef output_size);

}  // namespace wus::deferral
