#include "cpu/pool/kernels.h"
#include "cpu/pool/windows.inl"

namespace wus::cpu::WUS_ISA {
namespace pool {

template <class T>
void max_pool(const PoolShape& shape, const T* input, int64_t channels, bool relu, int64_t begin,
              int64_t end, T* output, uint8_t* code) {
  WUS_ISA::max_pool(
      shape, channels, relu, begin, end,
      [=](int64_t pixel, int64_t c, int lanes)
          WUS_INLINE_LAMBDA { return load(input + pixel * channels + c, lanes); },
      output, code);
}

template <class T>
void unpool(const PoolShape& shape, const T* grad, const uint8_t* code, int64_t channels,
            int64_t begin, int64_t end, T* grad_input) {
  unpool_pixels(shape, channels, grad, code, begin, end,
                [=](int64_t pixel, int64_t c, int lanes, Vec g)
                    WUS_INLINE_LAMBDA { store(grad_input + pixel * channels + c, g, lanes); });
}

template <class T>
void bias_grad(const T* grad, const uint8_t* code, int blocked, int64_t rows, int64_t channels,
               double* sums) {
  sum_rows<1>(rows, channels, sums,
              [=](int64_t r, int64_t c, int lanes, Vec* total) WUS_INLINE_LAMBDA {
                const IVec where = load_bytes(code + r * channels + c, lanes);
                const Vec g = load(grad + r * channels + c, lanes);
                total[0] += select(where == blocked, zero(), g);
              });
}

}  // namespace pool

template <class T>
const PoolKernels<T>& pool_kernels() {
  static constexpr PoolKernels<T> table = {pool::max_pool<T>, pool::unpool<T>, pool::bias_grad<T>};
  return table;
}
template const PoolKernels<float>& pool_kernels();
template const PoolKernels<Bf16>& pool_kernels();

}  // namespace wus::cpu::WUS_ISA
