// Squeeze-and-excitation's two operators on maps, with cheaper backwards than torch's.
#pragma once

#include <ATen/core/Tensor.h>

namespace wus {

// input [N, C, H, W] * gate [N, C, 1, 1], on the CPU, as torch.mul gives it.
at::Tensor gated(const at::Tensor& input, const at::Tensor& gate);

// The mean over H and W of input [N, C, H, W], as torch.mean gives it, or adaptive_avg_pool2d.
enum class GlobalMean { kMean, kMeanKeepDim, kPool };
at::Tensor global_mean(const at::Tensor& input, GlobalMean kind);

}  // namespace wus
