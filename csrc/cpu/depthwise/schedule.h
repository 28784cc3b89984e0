// A depthwise convolution's rows: into rings of rows that a cache holds, and out through what
// follows. Blocks of rows go to threads; what is summed over rows is summed within ranges that
// depend on the shape alone, and these are added in order.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/activation/following.h"
#include "cpu/activation/kernels.h"
#include "cpu/depthwise/kernels.h"

namespace wus::cpu {

struct DepthwiseShape {
  int64_t images, channels, height, width;  // of the input
  int64_t oh, ow;                           // of the output
  int64_t kernel, stride;
  int64_t padding_y, padding_x;
};

struct DepthwiseForward {
  DepthwiseShape shape;
  const float* input;
  const float* weight;  // [channels][kernel * kernel]
  const float* bias;    // or null
  float* output;
  Following following;
};

void run_depthwise(const DepthwiseForward& work);
// And returns the sums of the outputs and of their squares, float64 [2 * channels].
at::Tensor run_depthwise_sums(const DepthwiseForward& work);

struct DepthwiseBackward {
  DepthwiseShape shape;
  ActivationGrad grad;
  const NormCoefficients* norm;  // or null
  const float* weight;
  float* grad_input;   // or null
  const float* input;  // for the weight's gradient
  bool need_weight;
};

// Returns the weight's gradient, float64 [kernel * kernel * channels], or [0] if not wanted.
at::Tensor run_depthwise_backward(const DepthwiseBackward& work);

}  // namespace wus::cpu
