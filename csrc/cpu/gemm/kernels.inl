#include "cpu/gemm/kernels.h"
#include "cpu/simd/simd_rows.h"

namespace wus::cpu::WUS_ISA {

constexpr int kPanel = 2 * kWidth;

// Accumulators, two vectors of B and one of A fill the register file.
#if defined(WUS_AVX512)
constexpr int kGemmRows = 14;
#elif defined(WUS_AVX2) || defined(__aarch64__)
constexpr int kGemmRows = 6;
#else
constexpr int kGemmRows = 2;
#endif

// Bounds what a pass reads of A (kGemmRows rows) and B (one panel) so that A stays in L1.
constexpr int64_t kGemmDepth = 512;

// A is read by rows, or, transposed, out of a panel.
template <int kRows, bool kTransposed>
static void multiply_rows(const float* a, int64_t lda, const float* b, float* c, int64_t ldc,
                          int64_t depth, bool accumulate) {
  Vec left[kRows], right[kRows];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    left[i] = accumulate ? load(c + i * ldc) : zero();
    right[i] = accumulate ? load(c + i * ldc + kWidth) : zero();
  }
  for (int64_t k = 0; k < depth; ++k, b += kPanel) {
    const Vec b_left = load(b), b_right = load(b + kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec x = broadcast(a[kTransposed ? k * kPanel + i : i * lda + k]);
      left[i] = x * b_left + left[i];
      right[i] = x * b_right + right[i];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    store(c + i * ldc, left[i]);
    store(c + i * ldc + kWidth, right[i]);
  }
}

template <int kRows, bool kTransposed>
WUS_INLINE void multiply(int64_t rows, const float* a, int64_t lda, const float* b, float* c,
                         int64_t ldc, int64_t depth, bool accumulate) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      multiply_rows<kRows, kTransposed>(a, lda, b, c, ldc, depth, accumulate);
    } else {
      multiply<kRows - 1, kTransposed>(rows, a, lda, b, c, ldc, depth, accumulate);
    }
  }
}

static void gemm(const float* a, int64_t lda, const float* b, float* c, int64_t ldc, int64_t rows,
                 int64_t depth, int64_t panels, bool accumulate) {
  const int64_t passes = (rows + kGemmRows - 1) / kGemmRows;
  for (int64_t k = 0; k < depth; k += kGemmDepth) {
    const int64_t part = depth - k < kGemmDepth ? depth - k : kGemmDepth;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const float* b_part = b + (panel * depth + k) * kPanel;
      // Passes of nearly equal height: a pass of one or two rows would wait for its own sums.
      for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t row = pass * rows / passes, next = (pass + 1) * rows / passes;
        multiply<kGemmRows, false>(next - row, a + row * lda + k, lda, b_part,
                                   c + row * ldc + panel * kPanel, ldc, part, accumulate || k > 0);
      }
    }
  }
}

// One pass over kVectors vectors of columns, of the last one `lanes` lanes. a(i, k) is what row i
// of the result takes of step k, and b(k) is step k of the columns.
template <int kRows, int kVectors, class A, class B>
WUS_INLINE void multiply_pass(A a, B b, float* c, int64_t ldc, int64_t depth, int lanes,
                              bool accumulate) {
  const auto lanes_of = [=](int v) WUS_INLINE_LAMBDA { return v == kVectors - 1 ? lanes : kWidth; };
  Vec sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      sum[i][v] = accumulate ? load(c + i * ldc + v * kWidth, lanes_of(v)) : zero();
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec y[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) y[v] = load(b(k) + v * kWidth, lanes_of(v));
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec x = broadcast(a(i, k));
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[i][v] = x * y[v] + sum[i][v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(c + i * ldc + v * kWidth, sum[i][v], lanes_of(v));
  }
}

template <int kRows, int kVectors>
static void multiply_part(const float* a, int64_t lda, const float* b, float* c, int64_t ldc,
                          int64_t depth, int lanes, bool accumulate) {
  multiply_pass<kRows, kVectors>([=](int i, int64_t k) WUS_INLINE_LAMBDA { return a[i * lda + k]; },
                                 [=](int64_t k) WUS_INLINE_LAMBDA { return b + k * kPanel; }, c,
                                 ldc, depth, lanes, accumulate);
}

template <int kRows, int kVectors>
static void multiply_outer(const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                           int64_t ldc, int64_t depth, int lanes, bool accumulate) {
  multiply_pass<kRows, kVectors>([=](int i, int64_t k) WUS_INLINE_LAMBDA { return a[k * lda + i]; },
                                 [=](int64_t k) WUS_INLINE_LAMBDA { return b + k * ldb; }, c, ldc,
                                 depth, lanes, accumulate);
}

// body with `rows` as a constant; 0 < rows <= kGemmRows
template <int kRows = kGemmRows, class Body>
WUS_INLINE void with_rows(int64_t rows, const Body& body) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return with_rows<kRows - 1>(rows, body);
  }
  body.template operator()<kRows>();
}

// body(first row, number of rows) for passes of nearly equal height
template <class Body>
WUS_INLINE void for_passes(int64_t rows, const Body& body) {
  const int64_t passes = (rows + kGemmRows - 1) / kGemmRows;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t row = pass * rows / passes;
    body(row, (pass + 1) * rows / passes - row);
  }
}

static void gemm_part(const float* a, int64_t lda, const float* b, float* c, int64_t ldc,
                      int64_t rows, int64_t depth, int64_t columns, bool accumulate) {
  for (int64_t k = 0; k < depth; k += kGemmDepth) {
    const int64_t part = depth - k < kGemmDepth ? depth - k : kGemmDepth;
    for_passes(rows, [&](int64_t row, int64_t height) WUS_INLINE_LAMBDA {
      with_rows(height, [&]<int kRows>() WUS_INLINE_LAMBDA {
        const float* from = a + row * lda + k;
        const float* panel = b + k * kPanel;
        float* to = c + row * ldc;
        const bool more = accumulate || k > 0;
        if (columns <= kWidth) {
          multiply_part<kRows, 1>(from, lda, panel, to, ldc, part, (int)columns, more);
        } else {
          multiply_part<kRows, 2>(from, lda, panel, to, ldc, part, (int)columns - kWidth, more);
        }
      });
    });
  }
}

static void gemm_outer(const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                       int64_t ldc, int64_t rows, int64_t columns, int64_t depth, bool accumulate) {
  for (int64_t k = 0; k < depth; k += kGemmDepth) {
    const int64_t part = depth - k < kGemmDepth ? depth - k : kGemmDepth;
    for (int64_t column = 0; column < columns; column += kPanel) {
      const int64_t width = columns - column < kPanel ? columns - column : kPanel;
      for_passes(rows, [&](int64_t row, int64_t height) WUS_INLINE_LAMBDA {
        with_rows(height, [&]<int kRows>() WUS_INLINE_LAMBDA {
          const float* left = a + k * lda + row;
          const float* right = b + k * ldb + column;
          float* to = c + row * ldc + column;
          const bool more = accumulate || k > 0;
          if (width <= kWidth) {
            multiply_outer<kRows, 1>(left, lda, right, ldb, to, ldc, part, (int)width, more);
          } else if (width < kPanel) {
            multiply_outer<kRows, 2>(left, lda, right, ldb, to, ldc, part, (int)width - kWidth,
                                     more);
          } else {
            multiply_outer<kRows, 2>(left, lda, right, ldb, to, ldc, part, kWidth, more);
          }
        });
      });
    }
  }
}

static void gemm_transposed(const float* a, const float* b, float* c, int64_t rows, int64_t depth,
                            bool accumulate) {
  const int64_t passes = (rows + kGemmRows - 1) / kGemmRows;
  for (int64_t k = 0; k < depth; k += kGemmDepth) {
    const int64_t part = depth - k < kGemmDepth ? depth - k : kGemmDepth;
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t row = pass * rows / passes, next = (pass + 1) * rows / passes;
      multiply<kGemmRows, true>(next - row, a + k * kPanel + row, 0, b + k * kPanel,
                                c + row * kPanel, kPanel, part, accumulate || k > 0);
    }
  }
}

extern const GemmKernels gemm_kernels = {kPanel,    kGemmRows,  gemm,
                                         gemm_part, gemm_outer, gemm_transposed};

}  // namespace wus::cpu::WUS_ISA
