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

// Maps are of elements T; whatever is made of them in a cache is float.

template <class T>
struct DepthwiseForward {
  DepthwiseShape shape;
  const T* input;
  const float* weight;  // [channels][kernel * kernel]
  const float* bias;    // or null
  T* output;
  Following<T> following;
};

template <class T>
void run_depthwise(const DepthwiseForward<T>& work);
// And returns the sums of the outputs and of their squares, float64 [2 * channels].
template <class T>
at::Tensor run_depthwise_sums(const DepthwiseForward<T>& work);

template <class T>
struct DepthwiseBackward {
  DepthwiseShape shape;
  ActivationGrad<T> grad;
  const NormCoefficients* norm;  // or null
  const float* weight;
  T* grad_input;   // or null
  const T* input;  // for the weight's gradient
  bool need_weight;
};

// Returns the weight's gradient, float64 [kernel * kernel * channels], or [0] if not wanted.
template <class T>
at::Tensor run_depthwise_backward(const DepthwiseBackward<T>& work);

}  // namespace wus::cpu
