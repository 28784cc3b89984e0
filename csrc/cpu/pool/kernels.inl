#include "cpu/pool/kernels.h"
#include "cpu/pool/windows.inl"

namespace wus::cpu::WUS_ISA {
namespace pool {

void max_pool(const PoolShape& shape, const float* input, int64_t channels, bool relu,
              int64_t begin, int64_t end, float* output, uint8_t* code) {
  WUS_ISA::max_pool(
      shape, channels, relu, begin, end,
      [=](int64_t pixel, int64_t c, int lanes)
          WUS_INLINE_LAMBDA { return load(input + pixel * channels + c, lanes); },
      output, code);
}

void unpool(const PoolShape& shape, const float* grad, const uint8_t* code, int64_t channels,
            int64_t begin, int64_t end, float* grad_input) {
  unpool_pixels(shape, channels, grad, code, begin, end,
                [=](int64_t pixel, int64_t c, int lanes, Vec g)
                    WUS_INLINE_LAMBDA { store(grad_input + pixel * channels + c, g, lanes); });
}

void bias_grad(const float* grad, const uint8_t* code, int blocked, int64_t rows, int64_t channels,
               double* sums) {
  sum_rows<1>(rows, channels, sums,
              [=](int64_t r, int64_t c, int lanes, Vec* total) WUS_INLINE_LAMBDA {
                const IVec where = load_bytes(code + r * channels + c, lanes);
                const Vec g = load(grad + r * channels + c, lanes);
                total[0] += select(where == blocked, zero(), g);
              });
}

}  // namespace pool

const PoolKernels pool_kernels = {pool::max_pool, pool::unpool, pool::bias_grad};

}  // namespace wus::cpu::WUS_ISA
