// A depthwise convolution's rows: in through what stands in front of it, into rings of rows that a
// cache holds, and out through what follows. Blocks of rows go to threads; what is summed over rows
// is summed within ranges that depend on the shape alone, and these are added in order.
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
  Activated input;      // x, and what is applied to it
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
  float* grad_input;  // or null
  Activated input;    // for the weight's gradient, and for the sums below
  bool need_weight;
  const float* input_mean;  // or null: no sums
};

// Float64, [0] where not wanted: the weight's gradient [kernel * kernel * channels]; with g the
// gradient that passes what stands in front of the input x, the sums of g and of g * (x - mean)
// [2 * channels].
struct DepthwiseSums {
  at::Tensor weight, input;
};

DepthwiseSums run_depthwise_backward(const DepthwiseBackward& work);

}  // namespace wus::cpu
