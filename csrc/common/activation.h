// What follows a convolution, a linear layer or a normalisation, for the kernels of the CPU and of
// the GPU alike. What an activation's backward differentiates by is what it is given: bits, where
// the slope has two values only; else the activation's input, which behind a normalisation is
// computed again from the normalisation's.
#pragma once

namespace wus {

enum Activation : int {
  kNone = 0,
  kRelu = 1,
  kRelu6 = 2,
  kLeakyRelu = 3,  // `slope` below zero
  kHardsigmoid = 4,
  kHardswish = 5,
  kSilu = 6,
  kSigmoid = 7,
  kGelu = 8,
  kGeluTanh = 9,  // GELU's approximation by tanh
};
constexpr int kActivations = 10;

// Whether a bit an element is all that backward needs.
constexpr bool has_bits(int act) { return act >= kRelu && act <= kHardsigmoid; }

}  // namespace wus
