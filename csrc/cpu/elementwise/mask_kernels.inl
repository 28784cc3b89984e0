#include "cpu/elementwise/mask_kernels.h"
#include "cpu/simd/simd_rows.h"

namespace wus::cpu::WUS_ISA {
namespace mask {

void dropout(const float* input, const float* noise, float scale, bool relu, float* output,
             uint8_t* mask, int64_t rows, int64_t channels) {
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

void apply(const float* grad, const uint8_t* mask, float scale, float* output, int64_t rows,
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

const MaskKernels mask_kernels = {mask::dropout, mask::apply};

}  // namespace wus::cpu::WUS_ISA
