// What a transform cannot hold, by the library's own convolutions: its products mix the pixels of a
// tile, so that NaN, infinity and the rounding errors of huge numbers spread over it, and they are
// larger than the outputs, so that they overflow first.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "cpu/winograd/schedule.h"

namespace wus::cpu {

// One dimension of a filter as it comes back out of a transformed one: taps = rows * products.
struct Recovery {
  int points;
  float rows[3][6];
};

// packed: [points * points][plane] -> [outputs, inputs, 3, 3].
at::Tensor recover_weight(const at::Tensor& packed, const Recovery& recovery, int64_t inputs,
                          int64_t outputs);

// What winograd_forward returns, and winograd_dgrad but for its sums.
std::tuple<at::Tensor, at::Tensor> convolve_directly(const Convolution& convolution,
                                                     const at::Tensor& packed,
                                                     const std::optional<at::Tensor>& bias,
                                                     int64_t images);

// The weight gradient [outputs, inputs, 3, 3] of a convolution of `input` with this padding.
at::Tensor weigh_directly(const WeightGradient& gradient, const at::Tensor& input, int64_t padding);

}  // namespace wus::cpu
