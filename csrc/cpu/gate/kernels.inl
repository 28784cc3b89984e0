#include "cpu/gate/kernels.h"
#include "cpu/simd/simd_rows.h"

namespace wus::cpu::WUS_ISA {
namespace gate {

template <class T>
void backward(const T* grad, const T* input, const T* gate, int64_t rows, int64_t channels,
              T* grad_input, double* sums) {
  sum_rows<1>(rows, channels, sums,
              [=](int64_t r, int64_t c, int lanes, Vec* total) WUS_INLINE_LAMBDA {
                const int64_t i = r * channels + c;
                const Vec g = load(grad + i, lanes);
                if (input != nullptr) total[0] += g * load(input + i, lanes);
                if (gate != nullptr) store(grad_input + i, g * load(gate + c, lanes), lanes);
              });
}

}  // namespace gate

template <class T>
const GateKernels<T>& gate_kernels() {
  static constexpr GateKernels<T> table = {gate::backward<T>};
  return table;
}
template const GateKernels<float>& gate_kernels();
template const GateKernels<Bf16>& gate_kernels();

}  // namespace wus::cpu::WUS_ISA
