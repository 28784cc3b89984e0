// Sums over a map that is worked on in ranges: one row of sums for each, added in order.
#pragma once

#include <ATen/ops/zeros.h>

namespace wus::cpu {

class RangeSums {
 public:
  // No ranges: no sums.
  RangeSums(int64_t ranges, int64_t width) : sums_(at::zeros({ranges, width}, at::kDouble)) {}

  // Null without sums.
  double* of(int64_t range) const {
    return sums_.size(0) ? sums_.mutable_data_ptr<double>() + range * sums_.size(1) : nullptr;
  }

  // Float64 [width], or [0] without sums. Writes over the first range's.
  at::Tensor total() const {
    if (sums_.size(0) == 0) return sums_.flatten();
    const int64_t width = sums_.size(1);
    double* total = of(0);
    for (int64_t i = 1; i < sums_.size(0); ++i) {
      const double* range = of(i);
      for (int64_t c = 0; c < width; ++c) total[c] += range[c];
    }
    return sums_.select(0, 0);
  }

 private:
  at::Tensor sums_;
};

}  // namespace wus::cpu
