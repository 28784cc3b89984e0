#pragma once
// What follows a convolution or a normalisation: an activation, a max-pool.
#include <array>
#include <utility>
#include <vector>

#include "chains/kernels.h"
#include "common/activation.h"

namespace wus::chains {

using Size = std::array<int64_t, 2>;  // height, width

struct Act {
  int64_t kind = kNone;  // see common/activation.h
  double slope = 0;
  std::vector<int64_t> pool = {};  // kernel, stride, padding, ceil_mode; empty: none

  bool none() const { return kind == kNone && pool.empty(); }
  // Whether backward needs the activation's input.
  bool smooth() const { return kind != kNone && !has_bits(static_cast<int>(kind)); }
};

// An output and what backward needs: bits, codes, the activation's input; or undefined.
using Output = std::pair<Tensor, Tensor>;

// in_place: whether the input may be written over.
Output activate(const Kernels& kernels, const Tensor& input, const Act& act, bool in_place = true);

// The gradient in front of an activation, and its sum over all but the channels; undefined where
// not wanted.
//
// saved: as activate gives it.
// size: in front of a pool.
Output masked(const Kernels& kernels, const Tensor& grad, const Tensor& saved, const Act& act,
              const Size& size, bool need_grad, bool need_bias);

// An image, or its gradient, in channels_last, and anything else contiguous; of a batch of
// gradients the kernels are handed one after the other.
Tensor dense(const Tensor& image);

// In float32, in which norms, biases and their gradients are computed.
Tensor single(const Tensor& tensor);

inline OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

}  // namespace wus::chains
