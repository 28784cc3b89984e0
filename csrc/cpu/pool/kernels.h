// Max-pooling, with or without ReLU, that keeps one byte a pooled element: the position
// kernel * dy + dx of the maximum in its window, or kernel * kernel where it was not positive and
// passes no gradient. NHWC pixels; begin and end count output pixels, those of the input in
// `unpool`, so that a thread may take any range.
#pragma once

#include <stdint.h>

#include "cpu/pool/shape.h"
#include "cpu/simd/dispatch.h"
#include "cpu/simd/element.h"

namespace wus::cpu {

template <class T>
struct PoolKernels {
  void (*max_pool)(const PoolShape& shape, const T* input, int64_t channels, bool relu,
                   int64_t begin, int64_t end, T* output, uint8_t* code);
  void (*unpool)(const PoolShape& shape, const T* grad, const uint8_t* code, int64_t channels,
                 int64_t begin, int64_t end, T* grad_input);
  // sums[c] += the gradient that passes.
  void (*bias_grad)(const T* grad, const uint8_t* code, int blocked, int64_t rows, int64_t channels,
                    double* sums);
};

WUS_DECLARE_TABLES(PoolKernels, pool_kernels)

}  // namespace wus::cpu
