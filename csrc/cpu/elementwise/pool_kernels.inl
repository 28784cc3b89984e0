#include "cpu/elementwise/pool_kernels.h"
#include "cpu/elementwise/pool_window.h"

namespace wus::cpu::WUS_ISA {
namespace pool {

void relu_max_pool(const float* input, int64_t height, int64_t width, int64_t channels, bool relu,
                   int64_t begin, int64_t end, float* output, uint8_t* code) {
  max_pool(
      height, width, channels, relu, begin, end,
      [=](int64_t pixel, int64_t c, int lanes)
          WUS_INLINE_LAMBDA { return load(input + pixel * channels + c, lanes); },
      output, code);
}

void unpool(const float* grad, const uint8_t* code, int64_t height, int64_t width, int64_t channels,
            int64_t begin, int64_t end, float* grad_input) {
  Window window(height, width, begin);
  for (int64_t r = begin; r < end; ++r, window.next()) {
    for_channels(channels, [=](int64_t c, int lanes) WUS_INLINE_LAMBDA {
      const Vec g = load(grad + r * channels + c, lanes);
      const IVec where = load_bytes(code + r * channels + c, lanes);
      window.for_pixels([=](int64_t pixel, int position) WUS_INLINE_LAMBDA {
        store(grad_input + pixel * channels + c, select(where == position, g, zero()), lanes);
      });
    });
  }
}

void bias_grad(const float* grad, const uint8_t* code, int64_t rows, int64_t channels,
               double* sums) {
  sum_rows<1>(rows, channels, sums,
              [=](int64_t r, int64_t c, int lanes, Vec* total) WUS_INLINE_LAMBDA {
                const IVec where = load_bytes(code + r * channels + c, lanes);
                const Vec g = load(grad + r * channels + c, lanes);
                total[0] += select(where == kNothingPositive, zero(), g);
              });
}

}  // namespace pool

const PoolKernels pool_kernels = {pool::relu_max_pool, pool::unpool, pool::bias_grad};

}  // namespace wus::cpu::WUS_ISA
