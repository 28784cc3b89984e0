// What follows a convolution as its rows are made, and what it saves for backward.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/activation.h"
#include "cpu/activation/gradient.h"
#include "cpu/parallel_rows.h"

namespace wus::cpu {

// Nothing or an activation, whose input is kept unless kept is null, and whose bits unless mask is
// null.
template <class T>
struct Following {
  int act;
  float slope;
  T* kept;
  uint8_t* mask;

  // Returns what is saved of an activation behind `output`: bits, its input, or [0].
  at::Tensor set(const at::Tensor& output, int64_t activation, double its_slope) {
    act = static_cast<int>(activation);
    slope = static_cast<float>(its_slope);
    if (act == kNone) return nothing(output, at::kByte);
    at::Tensor saved = has_bits(act) ? empty_mask(output) : empty_rows(output);
    if (has_bits(act)) {
      mask = saved.mutable_data_ptr<uint8_t>();
    } else {
      kept = mutable_data<T>(saved);
    }
    return saved;
  }
};

}  // namespace wus::cpu
