// 1x1 convolution with unit stride: products of rows of pixels and a weight packed beforehand, out
// through what follows, block by block in a cache. What is summed over rows is summed within ranges
// that depend on the shape alone, and these are added in order.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/activation/following.h"
#include "cpu/activation/kernels.h"

namespace wus::cpu {

// Floats of a packed weight, [panels][inputs][panel].
int64_t pointwise_packed_size(int64_t inputs, int64_t outputs);
// weight [outputs][inputs] with strides in floats.
void pack_pointwise(const float* weight, int64_t output_stride, int64_t input_stride,
                    int64_t inputs, int64_t outputs, float* packed);

struct PointwiseForward {
  int64_t rows, inputs, outputs;
  const float* input;
  const float* packed;  // of inputs and outputs
  const float* bias;    // or null
  float* output;
  Following<float> following;
};

// Returns the sums of the outputs and of their squares, float64 [2 * outputs], if wanted, else [0].
at::Tensor run_pointwise(const PointwiseForward& work, bool want_sums);

struct PointwiseBackward {
  int64_t rows, inputs, outputs;  // of the forward pass
  ActivationGrad<float> grad;
  const NormCoefficients* norm;  // or null
  const float* packed;           // the transposed weight's, for grad_input
  float* grad_input;             // or null
  const float* input;            // for the weight's gradient
  float* grad_weight;            // [outputs][inputs], or null
};

void run_pointwise_backward(const PointwiseBackward& work);

}  // namespace wus::cpu
