// Activations over dense float rows [rows, channels], with what stands in front of them: scale and
// shift of each channel, a residual. Serial; rows [begin, end) of a map are read where they lie,
// and what is written goes to rows of its own, so that a block of a map may be written into a
// cache.
#pragma once

#include <stdint.h>

#include "common/activation.h"
#include "cpu/simd/dispatch.h"

namespace wus::cpu {

// act(scale * x + shift + residual)
struct Activated {
  const float* x;
  const float *scale, *shift;  // [channels], both or neither
  const float* residual;       // or null
  int64_t channels;
  int act;
  float slope;
};

// The gradient g that passes an activation.
struct ActivationGrad {
  const float* grad;    // of the output
  const uint8_t* mask;  // bits; null where the slope follows from scale * x + shift
  const float* x;
  const float *scale, *shift;  // both or neither
  int64_t channels;
  int act;
  float slope;
};

// What a normalisation makes of it: a * g + b * x + c.
struct NormCoefficients {
  const float *a, *b, *c;  // [channels]
};

// Where rows are written: the first at `data`, the next `stride` floats further.
struct RowsOut {
  float* data;
  int64_t stride;
};

struct ActivationKernels {
  // mask: rows of bits, or null where none are wanted or needed.
  void (*forward)(const Activated& op, int64_t begin, int64_t end, RowsOut output, uint8_t* mask);
  // output: g, or with coefficients what the normalisation makes of it; gated: rows for g, or null.
  void (*backward)(const ActivationGrad& op, const NormCoefficients* coefficients, int64_t begin,
                   int64_t end, RowsOut output, float* gated);
  // sums[c] += g, and unless mean is null sums[channels + c] += g * (x - mean); gated as above.
  void (*grad_sums)(const ActivationGrad& op, const float* mean, int64_t begin, int64_t end,
                    double* sums, float* gated);
};

WUS_DECLARE_TABLE(ActivationKernels, activation_kernels)

}  // namespace wus::cpu
