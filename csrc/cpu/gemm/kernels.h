// C = A * B for a row-major A and a B packed beforehand into panels of columns.
#pragma once

#include <stdint.h>

#include "cpu/simd/dispatch.h"

namespace wus::cpu {

struct GemmKernels {
  int panel;  // columns of B in a panel, floats
  int rows;   // rows of A one pass over a panel handles
  // c[rows][panels * panel] = a[rows][depth] * b[panels][depth][panel]; lda and ldc are row strides
  // in floats. Whole panels of c are written; added to what c holds if `accumulate`.
  void (*run)(const float* a, int64_t lda, const float* b, float* c, int64_t ldc, int64_t rows,
              int64_t depth, int64_t panels, bool accumulate);
  // Of one panel of b, the first `columns` columns, which are all that is written of c.
  void (*run_part)(const float* a, int64_t lda, const float* b, float* c, int64_t ldc, int64_t rows,
                   int64_t depth, int64_t columns, bool accumulate);
  // c[rows][columns] = a[depth][rows]^T * b[depth][columns], none of them packed.
  void (*run_outer)(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                    int64_t rows, int64_t columns, int64_t depth, bool accumulate);
  // c[rows][panel] = a[depth][panel]^T * b[depth][panel], of the first `rows` columns of a; added
  // to what c holds if `accumulate`.
  void (*run_transposed)(const float* a, const float* b, float* c, int64_t rows, int64_t depth,
                         bool accumulate);
};

WUS_DECLARE_TABLE(GemmKernels, gemm_kernels)

}  // namespace wus::cpu
