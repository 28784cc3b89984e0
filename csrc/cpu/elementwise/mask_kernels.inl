#include "cpu/elementwise/mask_kernels.h"
#include "cpu/simd/simd_rows.h"

namespace wus::cpu::WUS_ISA {
namespace mask {

template <class T>
void dropout(const T* input, const T* noise, float scale, bool relu, T* output, uint8_t* mask,
             int64_t rows, int64_t channels) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = r * channels;
    uint8_t* row_mask = mask + r * mask_bytes(channels);
    for_channels(channels, [=](int64_t c, int lanes) WUS_INLINE_LAMBDA {
      const Vec factor = load(noise + row + c, lanes) * broadcast(scale);
      Vec x = load(input + row + c, lanes);
      IVec keep = factor > zero();
      if (relu) {
        const IVec positive = relu_mask(x);
        x = select(positive, x, zero());
        keep &= positive;
      }
      // A product, not a select: a dropped infinity or NaN is NaN, as stock dropout has it.
      store(output + row + c, x * factor, lanes);
      store_bits(row_mask + c / 8, to_bits(keep), lanes);
    });
  }
}

template <class T>
void apply(const T* grad, const uint8_t* mask, float scale, T* output, int64_t rows,
           int64_t channels) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = r * channels;
    const uint8_t* row_mask = mask + r * mask_bytes(channels);
    for_channels(channels, [=](int64_t c, int lanes) WUS_INLINE_LAMBDA {
      const IVec keep = from_bits(load_bits(row_mask + c / 8, lanes));
      const Vec scaled = load(grad + row + c, lanes) * broadcast(scale);
      store(output + row + c, select(keep, scaled, zero()), lanes);
    });
  }
}

}  // namespace mask

template <class T>
const MaskKernels<T>& mask_kernels() {
  static constexpr MaskKernels<T> table = {mask::dropout<T>, mask::apply<T>};
  return table;
}
template const MaskKernels<float>& mask_kernels();
template const MaskKernels<Bf16>& mask_kernels();

}  // namespace wus::cpu::WUS_ISA
