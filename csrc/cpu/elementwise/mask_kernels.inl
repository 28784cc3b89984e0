#include "cpu/elementwise/mask_kernels.h"
#include "cpu/simd/simd_rows.h"

namespace wus::cpu::WUS_ISA {
namespace mask {

// value(i, lanes) is what ReLU is applied to.
template <class Value>
WUS_INLINE void relu_of(Value value, float* output, uint8_t* mask, int64_t rows, int64_t channels) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = r * channels;
    uint8_t* row_mask = mask + r * mask_bytes(channels);
    for_channels(channels, [=](int64_t c, int lanes) WUS_INLINE_LAMBDA {
      const Vec x = value(row + c, lanes);
      const IVec keep = relu_mask(x);
      store(output + row + c, select(keep, x, zero()), lanes);
      store_bits(row_mask + c / 8, to_bits(keep), lanes);
    });
  }
}

void relu(const float* input, float* output, uint8_t* mask, int64_t rows, int64_t channels) {
  relu_of([=](int64_t i, int lanes) WUS_INLINE_LAMBDA { return load(input + i, lanes); }, output,
          mask, rows, channels);
}

void add_relu(const float* input, const float* other, float* output, uint8_t* mask, int64_t rows,
              int64_t channels) {
  relu_of([=](int64_t i, int lanes)
              WUS_INLINE_LAMBDA { return load(input + i, lanes) + load(other + i, lanes); },
          output, mask, rows, channels);
}

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

template <bool kStore>
WUS_INLINE void masked_sum(const float* grad, const uint8_t* mask, float* grad_input, double* sums,
                           int64_t rows, int64_t channels) {
  const int64_t bytes = mask_bytes(channels);
  sum_rows<1>(rows, channels, sums,
              [=](int64_t r, int64_t c, int lanes, Vec* total) WUS_INLINE_LAMBDA {
                const IVec keep = from_bits(load_bits(mask + r * bytes + c / 8, lanes));
                const Vec g = select(keep, load(grad + r * channels + c, lanes), zero());
                if (kStore) store(grad_input + r * channels + c, g, lanes);
                total[0] += g;
              });
}

void bias_grad(const float* grad, const uint8_t* mask, float* grad_input, double* sums,
               int64_t rows, int64_t channels) {
  if (!mask) {
    sum_rows<1>(rows, channels, sums,
                [=](int64_t r, int64_t c, int lanes, Vec* total)
                    WUS_INLINE_LAMBDA { total[0] += load(grad + r * channels + c, lanes); });
  } else if (grad_input) {
    masked_sum<true>(grad, mask, grad_input, sums, rows, channels);
  } else {
    masked_sum<false>(grad, mask, nullptr, sums, rows, channels);
  }
}

}  // namespace mask

const MaskKernels mask_kernels = {mask::relu, mask::add_relu, mask::dropout, mask::apply,
                                  mask::bias_grad};

}  // namespace wus::cpu::WUS_ISA
