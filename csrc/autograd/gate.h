// Squeeze-and-excitation's two operators on maps, with backwards of one pass and none.
#pragma once

#include <ATen/core/Tensor.h>

namespace wus {

// input [N, C, H, W] * gate [N, C, 1, 1], on the CPU, as torch.mul gives it.
at::Tensor gated(const at::Tensor& input, const at::Tensor& gate);

// The mean over H and W of input [N, C, H, W], [N, C, 1, 1] or with keep false [N, C], as
// torch.mean gives it. Backward hands out a number an image's channel, expanded.
at::Tensor pixel_mean(const at::Tensor& input, bool keep);

// The same as torch's adaptive_avg_pool2d gives it.
at::Tensor pixel_average(const at::Tensor& input);

}  // namespace wus
