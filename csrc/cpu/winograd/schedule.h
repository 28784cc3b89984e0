// How a Winograd convolution is scheduled over threads: by tiles where the weight fits a cache, by
// frequencies where it does not; and what is summed over the tiles on the way.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/divide.h"
#include "cpu/winograd/kernels.h"

namespace wus::cpu {

struct SchemeInfo {
  WinogradScheme kernel;
  int64_t tile, frequencies;
};

// Packed weights: [frequencies][plane], a plane being [panels][inputs][panel] and some padding that
// keeps the planes from falling on the same cache sets.
int64_t plane_size(int64_t inputs, int64_t outputs);

// Tile counts in `in` and `out` are left to run_winograd.
struct Convolution {
  SchemeInfo scheme;
  WinogradSource source;
  WinogradEpilogue epilogue;
  WinogradInput in;
  WinogradOutput out;
  const float* packed;
};

struct Outcome {
  // Over the source's pixels [channels], or the mean and biased variance of the outputs
  // [2, channels], or empty.
  at::Tensor sums;
  bool trusted;  // whether outputs and sums are right; if not, direct.h makes them
};

Outcome run_winograd(const Convolution& convolution, int64_t images, bool want_sums,
                     const at::TensorOptions& options);

struct WeightGradient {
  SchemeInfo scheme;
  WinogradSource source;  // of `grad`
  WinogradInput input, grad;
  WinogradGradient weight;
};

// Writes the weight gradient of a convolution with this many tiles, at least one. Returns whether
// it can be trusted; if not, direct.h makes it.
bool run_winograd_wgrad(const WeightGradient& gradient, int64_t tiles);

}  // namespace wus::cpu
