// Mean and variance of each channel from sums over rows.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <tuple>

namespace wus::cpu {

// moments: float64 [2 * channels], the sums of the values and of their squares.
inline std::tuple<at::Tensor, at::Tensor> statistics(const at::Tensor& moments, int64_t count) {
  const int64_t channels = moments.numel() / 2;
  const double* sums = moments.const_data_ptr<double>();
  const auto options = moments.options().dtype(at::kFloat);
  at::Tensor mean = at::empty({channels}, options), var = at::empty({channels}, options);
  float* mean_data = mean.mutable_data_ptr<float>();
  float* var_data = var.mutable_data_ptr<float>();
  for (int64_t c = 0; c < channels; ++c) {
    const double m = sums[c] / static_cast<double>(count);
    const double v = sums[channels + c] / static_cast<double>(count) - m * m;
    mean_data[c] = static_cast<float>(m);
    var_data[c] = static_cast<float>(v < 0 ? 0 : v);  // NaN stays NaN
  }
  return {mean, var};
}

}  // namespace wus::cpu
