#include "cpu/gemm/kernels.h"

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

extern const GemmKernels gemm_kernels = {kPanel, kGemmRows, gemm, gemm_transposed};

}  // namespace wus::cpu::WUS_ISA
