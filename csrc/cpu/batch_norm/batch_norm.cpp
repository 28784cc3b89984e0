#include <ATen/ops/add.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <utility>

#include "cpu/activation/gradient.h"
#include "cpu/batch_norm/kernels.h"
#include "cpu/batch_norm/statistics.h"
#include "cpu/maps.h"
#include "cpu/parallel_rows.h"
#include "cpu/pool/pool.h"

namespace wus::cpu {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// The max-pool that follows, if one does.
std::optional<PoolShape> pool_behind(at::IntArrayRef pool, int64_t act, const at::Tensor& input) {
  if (pool.empty()) return std::nullopt;
  TORCH_CHECK_VALUE(act == kNone || act == kRelu, "pool needs act 0 (none) or 1 (ReLU), got act ",
                    act);
  TORCH_CHECK_VALUE(input.dim() == 4, "input must be [N, C, H, W] for pool ", pool, ", got size ",
                    input.sizes());
  return pool_shape(pool, input.sizes().slice(2));
}

std::tuple<at::Tensor, at::Tensor> batch_norm_stats(const at::Tensor& input) {
  return for_type(input, "input", [&](auto element) {
    using T = decltype(element);
    const at::Tensor x = as_rows<T>(input, "input");
    const Rows shape(x);
    const int64_t channels = shape.channels;
    const T* in = data<T>(x);
    const at::Tensor moments = sum_over_rows(
        shape.rows, channels, 2 * channels, [&](int64_t begin, int64_t end, double* sums) {
          WUS_DISPATCH(batch_norm_kernels<T>())
              .moments(in + begin * channels, end - begin, channels, sums);
        });
    return statistics(moments, shape.rows);
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_scale_shift(const at::Tensor& mean,
                                                                      const at::Tensor& var,
                                                                      const OptionalTensor& weight,
                                                                      const OptionalTensor& bias,
                                                                      double eps) {
  const int64_t channels = mean.numel();
  const at::Tensor m = per_channel(mean, "mean", channels);
  const at::Tensor v = per_channel(var, "var", channels);
  const at::Tensor gamma = per_channel(weight, "weight", channels);
  const at::Tensor beta = per_channel(bias, "bias", channels);
  at::Tensor scale = at::empty_like(m), shift = at::empty_like(m), invstd = at::empty_like(m);
  const float *mp = data(m), *vp = data(v), *gp = data(gamma), *bp = data(beta);
  float* scale_data = scale.data_ptr<float>();
  float* shift_data = shift.data_ptr<float>();
  float* invstd_data = invstd.data_ptr<float>();
  for (int64_t c = 0; c < channels; ++c) {
    const double inverse = 1 / std::sqrt(vp[c] + eps);
    const double s = gp ? inverse * gp[c] : inverse;
    invstd_data[c] = static_cast<float>(inverse);
    scale_data[c] = static_cast<float>(s);
    shift_data[c] = static_cast<float>((bp ? bp[c] : 0.0) - mp[c] * s);
  }
  return {scale, shift, invstd};
}

void batch_norm_update_running(at::Tensor running_mean, at::Tensor running_var,
                               const at::Tensor& mean, const at::Tensor& var, double momentum,
                               int64_t count) {
  const int64_t channels = mean.numel();
  const at::Tensor m = per_channel(mean, "mean", channels);
  const at::Tensor v = per_channel(var, "var", channels);
  for (const auto& [running, name] :
       {std::pair(running_mean, "running_mean"), std::pair(running_var, "running_var")}) {
    per_channel(running, name, channels);
    TORCH_CHECK_VALUE(running.is_contiguous(), name, " must be contiguous");
  }
  const double unbiased = static_cast<double>(count) / static_cast<double>(count - 1);
  float* running_mean_data = running_mean.data_ptr<float>();
  float* running_var_data = running_var.data_ptr<float>();
  for (int64_t c = 0; c < channels; ++c) {
    running_mean_data[c] =
        static_cast<float>((1 - momentum) * running_mean_data[c] + momentum * data(m)[c]);
    running_var_data[c] = static_cast<float>((1 - momentum) * running_var_data[c] +
                                             momentum * (data(v)[c] * unbiased));
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_train(
    const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, double momentum,
    double eps, const OptionalTensor& offset) {
  TORCH_CHECK_VALUE(running_mean.has_value() == running_var.has_value(),
                    "running_mean and running_var must be given together");
  auto [mean, var] = batch_norm_stats(input);
  if (running_mean && input.numel()) {
    batch_norm_update_running(*running_mean, *running_var, offset ? at::add(mean, *offset) : mean,
                              var, momentum, input.numel() / mean.numel());
  }
  if (offset) mean = at::add(mean, *offset, 0);  // what is not finite makes all behind it NaN
  auto [scale, shift, invstd] = batch_norm_scale_shift(mean, var, weight, bias, eps);
  return {mean, scale, shift, invstd};
}

template <class T>
std::tuple<at::Tensor, at::Tensor> pool_normalized(const at::Tensor& x, const at::Tensor& scale,
                                                   const at::Tensor& shift, const PoolShape& shape,
                                                   bool relu) {
  const int64_t batch = x.size(0), channels = x.size(1);
  at::Tensor output = empty_map(x, channels, shape.oh, shape.ow);
  at::Tensor code = at::empty({batch, shape.oh, shape.ow, channels}, x.options().dtype(at::kByte));
  const PooledNorm<T> op = {shape, data<T>(x), data(scale), data(shift), channels, relu};
  T* out = mutable_data<T>(output);
  uint8_t* codes = code.data_ptr<uint8_t>();
  for_rows(batch * shape.oh * shape.ow, channels, [&](int64_t begin, int64_t end) {
    WUS_DISPATCH(batch_norm_kernels<T>()).pool(op, begin, end, out, codes);
  });
  return {output, code};
}

template <class T>
std::tuple<at::Tensor, at::Tensor> normalize(const at::Tensor& input, const OptionalTensor& scale,
                                             const at::Tensor& shift,
                                             const OptionalTensor& residual, int64_t act,
                                             double slope, at::IntArrayRef pool, bool need_mask) {
  const auto shape = pool_behind(pool, act, input);
  const at::Tensor x = as_rows<T>(input, "input");
  const Rows rows(x);
  const int64_t channels = rows.channels;
  const at::Tensor s = scale ? per_channel(*scale, "scale", channels)
                             : at::ones({channels}, x.options().dtype(at::kFloat));
  const at::Tensor t = per_channel(shift, "shift", channels);
  const bool bits = has_bits(static_cast<int>(act));
  at::Tensor added;
  if (residual) {
    TORCH_CHECK_VALUE(!shape && (act == kNone || bits),
                      "residual needs an act whose backward needs no input (0 to 4) and no pool, "
                      "got act ",
                      act, " and pool ", pool);
    added = as_rows<T>(*residual, "residual");
    check_same_size(added, "residual", x, "input");
  }
  if (shape) return pool_normalized<T>(x, s, t, *shape, act == kRelu);
  at::Tensor output = empty_rows(x);
  at::Tensor mask = bits && need_mask ? empty_mask(x) : nothing(x, at::kByte);
  const Activated<T> op = {data<T>(x),
                           data(s),
                           data(t),
                           data<T>(added),
                           channels,
                           static_cast<int>(act),
                           static_cast<float>(slope)};
  T* out = mutable_data<T>(output);
  uint8_t* to = bits && need_mask ? mask.data_ptr<uint8_t>() : nullptr;
  for_rows(rows.rows, channels, [&](int64_t begin, int64_t end) {
    WUS_DISPATCH(activation_kernels<T>())
        .forward(op, begin, end, {out + begin * channels, channels},
                 to ? to + begin * rows.mask_bytes() : nullptr);
  });
  return {output, mask};
}

std::tuple<at::Tensor, at::Tensor> batch_norm_apply(const at::Tensor& input,
                                                    const OptionalTensor& scale,
                                                    const at::Tensor& shift,
                                                    const OptionalTensor& residual, int64_t act,
                                                    double slope, at::IntArrayRef pool,
                                                    bool need_mask) {
  check_act(act);
  return for_type(input, "input", [&](auto element) {
    return normalize<decltype(element)>(input, scale, shift, residual, act, slope, pool, need_mask);
  });
}

// The gradient behind a normalisation: what passes the activation, or a max-pool with its codes.
template <class T>
struct Backward {
  at::Tensor grad, x;
  std::optional<PassedGradient<T>> passed;  // without a pool
  PooledNormGrad<T> pooled{};               // with one

  Backward(const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& mask,
           const OptionalTensor& scale, const OptionalTensor& shift, int64_t act, double slope,
           at::IntArrayRef pool) {
    x = as_rows<T>(input, "input");
    grad = as_rows<T>(grad_output, "grad_output");
    const int64_t channels = Rows(x).channels;
    const auto shape = pool_behind(pool, act, x);
    if (!shape) {
      const at::Tensor s = per_channel(scale, "scale", channels),
                       t = per_channel(shift, "shift", channels);
      check_act(act);
      TORCH_CHECK_VALUE(act == kNone || mask || (scale && shift),
                        "mask, or scale and shift, must be given for act ", act, ", got neither");
      passed.emplace(grad, mask, x, "input", s, t, act, slope);
      return;
    }
    const int64_t batch = x.size(0);
    TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef({batch, channels, shape->oh, shape->ow}),
                      "grad_output must be [N, C, ", shape->oh, ", ", shape->ow,
                      "] for input of size ", x.sizes(), " and pool ", pool, ", got size ",
                      grad.sizes());
    TORCH_CHECK_VALUE(mask, "mask must be given for pool ", pool, ": the codes");
    check_bytes(*mask, "mask", {batch, shape->oh, shape->ow, channels});
    pooled = {*shape, data<T>(grad), data<T>(x), mask->const_data_ptr<uint8_t>(), channels};
  }
};

// The sums of the gradient g that passes the activation and of g * (x - mean): float64
// [2 * channels].
template <class T>
at::Tensor grad_sums(const Backward<T>& backward, const at::Tensor& mean) {
  const Rows shape(backward.grad);
  return sum_over_rows(
      shape.rows, shape.channels, 2 * shape.channels, [&](int64_t begin, int64_t end, double* sum) {
        if (backward.passed) {
          WUS_DISPATCH(activation_kernels<T>())
              .grad_sums(backward.passed->op, data(mean), begin, end, sum, nullptr);
        } else {
          WUS_DISPATCH(batch_norm_kernels<T>())
              .pool_grad_sums(backward.pooled, data(mean), begin, end, sum);
        }
      });
}

// d loss / d x = gamma * invstd * (g - mean(g) - xhat * mean(g * xhat)) as a * g + b * x + c0.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_grad_coefficients(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mean,
    const at::Tensor& invstd, const OptionalTensor& weight, const OptionalTensor& mask,
    const OptionalTensor& scale, const OptionalTensor& shift, int64_t act, double slope,
    at::IntArrayRef pool) {
  const int64_t channels = mean.numel();
  const at::Tensor m = per_channel(mean, "mean", channels);
  const at::Tensor inverse = per_channel(invstd, "invstd", channels);
  const at::Tensor gamma = per_channel(weight, "weight", channels);
  const auto [sums, rows] = for_type(input, "input", [&](auto element) {
    const Backward<decltype(element)> backward(grad_output, input, mask, scale, shift, act, slope,
                                               pool);
    const Rows shape(backward.x);
    TORCH_CHECK_VALUE(shape.channels == channels, "mean must be a Float tensor of size [",
                      shape.channels, "], got size ", mean.sizes());
    return std::pair(grad_sums(backward, m), shape.rows);
  });
  if (rows == 0) {
    std::array<at::Tensor, 5> none;
    for (at::Tensor& tensor : none) tensor = at::zeros_like(m);
    return {none[0], none[1], none[2], none[3], none[4]};
  }
  const double *sum = sums.template const_data_ptr<double>(), *sum_xmu = sum + channels;
  const double count = static_cast<double>(rows);
  std::array<at::Tensor, 5> made;
  for (at::Tensor& tensor : made) tensor = at::empty_like(m);
  float *a_data = made[0].data_ptr<float>(), *b_data = made[1].data_ptr<float>(),
        *c_data = made[2].data_ptr<float>(), *grad_bias = made[3].data_ptr<float>(),
        *grad_weight = made[4].data_ptr<float>();
  for (int64_t c = 0; c < channels; ++c) {
    const double invstd_c = data(inverse)[c];
    const double a = gamma.defined() ? data(gamma)[c] * invstd_c : invstd_c;
    const double b = -a * invstd_c * invstd_c * sum_xmu[c] / count;
    a_data[c] = static_cast<float>(a);
    b_data[c] = static_cast<float>(b);
    c_data[c] = static_cast<float>(-a * sum[c] / count - b * data(m)[c]);
    grad_bias[c] = static_cast<float>(sum[c]);
    grad_weight[c] = static_cast<float>(sum_xmu[c] * invstd_c);
  }
  return {made[0], made[1], made[2], made[3], made[4]};
}

std::tuple<at::Tensor, at::Tensor> batch_norm_grad_input(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& a,
    const at::Tensor& b, const at::Tensor& c0, const OptionalTensor& mask,
    const OptionalTensor& scale, const OptionalTensor& shift, int64_t act, double slope,
    at::IntArrayRef pool, bool need_grad_residual) {
  TORCH_CHECK_VALUE(!need_grad_residual || (mask && pool.empty()),
                    "need_grad_residual needs a mask of bits and no pool, got act ", act,
                    " and pool ", pool);
  return for_type(input, "input", [&](auto element) -> std::tuple<at::Tensor, at::Tensor> {
    using T = decltype(element);
    const Backward<T> backward(grad_output, input, mask, scale, shift, act, slope, pool);
    const Rows shape(backward.x);
    const int64_t channels = shape.channels;
    const at::Tensor a_ = per_channel(a, "a", channels), b_ = per_channel(b, "b", channels),
                     c_ = per_channel(c0, "c0", channels);
    const NormCoefficients coefficients = {data(a_), data(b_), data(c_)};
    at::Tensor grad_input = empty_rows(backward.x);
    at::Tensor grad_residual =
        need_grad_residual ? empty_rows(backward.x) : nothing(backward.x, kTypeOf<T>);
    T* out = mutable_data<T>(grad_input);
    T* residual = need_grad_residual ? mutable_data<T>(grad_residual) : nullptr;
    for_rows(shape.rows, channels, [&](int64_t begin, int64_t end) {
      if (backward.passed) {
        const int64_t i = begin * channels;
        WUS_DISPATCH(activation_kernels<T>())
            .backward(backward.passed->op, &coefficients, begin, end, {out + i, channels},
                      residual ? residual + i : nullptr);
      } else {
        WUS_DISPATCH(batch_norm_kernels<T>())
            .pool_grad_input(backward.pooled, coefficients, begin, end, out);
      }
    });
    return {grad_input, grad_residual};
  });
}

TORCH_LIBRARY_IMPL(wus, CPU, m) {
  m.impl("batch_norm_stats", &batch_norm_stats);
  m.impl("batch_norm_scale_shift", &batch_norm_scale_shift);
  m.impl("batch_norm_update_running", &batch_norm_update_running);
  m.impl("batch_norm_train", &batch_norm_train);
  m.impl("batch_norm_apply", &batch_norm_apply);
  m.impl("batch_norm_grad_coefficients", &batch_norm_grad_coefficients);
  m.impl("batch_norm_grad_input", &batch_norm_grad_input);
}

}  // namespace
}  // namespace wus::cpu
