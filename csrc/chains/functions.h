#pragma once
// Chains as autograd functions: what they save for backward, and what their backward computes.
#include "chains/algorithm.h"

namespace wus::chains {

// act(batch_norm(conv(input) + bias) + residual), of which all but the convolution may be missing.
// Images are in channels_last.
//
// trained: the weight, where it gets a gradient.
Tensor chained(AlgorithmPtr algorithm, const Tensor& input, const Tensor& bias,
               const Tensor& trained, const std::optional<BatchNorm>& norm, const Tensor& residual,
               const Act& act);

// An image in channels_last whose gradient leaves in the layout that stock would give.
//
// stock_like: that is channels_last whatever the image's layout.
Tensor entered(const Tensor& input, bool stock_like);

}  // namespace wus::chains
