#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "cpu/batch_norm/kernels.h"
#include "cpu/parallel_rows.h"

namespace wus::cpu {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// A dense vector with one element a channel, or null.
at::Tensor per_channel(const at::Tensor& t, const char* name, int64_t channels,
                       at::ScalarType type = at::kFloat) {
  TORCH_CHECK_VALUE(
      t.device().is_cpu() && t.scalar_type() == type && t.dim() == 1 && t.size(0) == channels, name,
      " must be a ", type, " tensor of size [", channels, "] on the CPU, got ", t.scalar_type(),
      " of size ", t.sizes(), " on ", t.device());
  return t.contiguous();
}

at::Tensor per_channel(const OptionalTensor& t, const char* name, int64_t channels) {
  return t ? per_channel(*t, name, channels) : at::Tensor();
}

const float* data(const at::Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }

void check_act(int64_t act, const at::Tensor& input) {
  TORCH_CHECK_VALUE(act >= kNone && act <= kReluRecompute,
                    "act must be 0 (none), 1 (ReLU, mask), 2 (ReLU and 2x2 max-pool, codes) or 3 "
                    "(ReLU, mask computed again), got ",
                    act);
  TORCH_CHECK_VALUE(
      act != kReluMaxPool || (input.dim() == 4 && input.size(2) >= 2 && input.size(3) >= 2),
      "input must be [N, C, H, W] with H and W at least 2 for act 2, got size ", input.sizes());
}

int64_t extent(const at::Tensor& x, int64_t dim) { return x.dim() == 4 ? x.size(dim) : 1; }

std::tuple<at::Tensor, at::Tensor> batch_norm_stats(const at::Tensor& input) {
  const at::Tensor x = as_rows(input, "input");
  const Rows shape(x);
  const int64_t channels = shape.channels;
  const float* in = x.const_data_ptr<float>();
  const at::Tensor moments = sum_over_rows(
      shape.rows, channels, 2 * channels, [&](int64_t begin, int64_t end, double* sums) {
        WUS_DISPATCH(batch_norm_kernels)
            .moments(in + begin * channels, end - begin, channels, sums);
      });
  const double* sums = moments.const_data_ptr<double>();
  at::Tensor mean = at::empty({channels}, x.options());
  at::Tensor var = at::empty({channels}, x.options());
  float* mean_data = mean.data_ptr<float>();
  float* var_data = var.data_ptr<float>();
  const double count = static_cast<double>(shape.rows);
  for (int64_t c = 0; c < channels; ++c) {
    const double m = sums[c] / count;
    const double v = sums[channels + c] / count - m * m;
    mean_data[c] = static_cast<float>(m);
    var_data[c] = static_cast<float>(v < 0 ? 0 : v);  // NaN stays NaN
  }
  return {mean, var};
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

std::tuple<at::Tensor, at::Tensor> batch_norm_apply(const at::Tensor& input,
                                                    const OptionalTensor& scale,
                                                    const at::Tensor& shift,
                                                    const OptionalTensor& residual, int64_t act) {
  check_act(act, input);
  const at::Tensor x = as_rows(input, "input");
  const Rows shape(x);
  const at::Tensor s = scale ? per_channel(*scale, "scale", shape.channels)
                             : at::ones({shape.channels}, x.options().dtype(at::kFloat));
  const at::Tensor t = per_channel(shift, "shift", shape.channels);
  at::Tensor added;
  if (residual) {
    TORCH_CHECK_VALUE(act == kNone || act == kReluMask,
                      "residual needs act 0 (none) or 1 (ReLU with a mask), got act ", act);
    added = as_rows(*residual, "residual");
    check_same_size(added, "residual", x, "input");
  }
  const int64_t height = extent(x, 2), width = extent(x, 3);
  at::Tensor output, mask;
  int64_t rows = shape.rows;
  if (act == kReluMaxPool) {
    const int64_t batch = x.size(0), oh = height / 2, ow = width / 2;
    rows = batch * oh * ow;
    output = at::empty({batch, shape.channels, oh, ow},
                       x.options().memory_format(at::MemoryFormat::ChannelsLast));
    mask = at::empty({batch, oh, ow, shape.channels}, x.options().dtype(at::kByte));
  } else {
    output = empty_rows(x);
    mask = act == kReluMask ? empty_mask(x) : nothing(x, at::kByte);
  }
  const BatchNorm op = {data(x), data(s), data(t),        data(added),
                        height,  width,   shape.channels, static_cast<int>(act)};
  float* out = output.data_ptr<float>();
  uint8_t* bits = mask.data_ptr<uint8_t>();
  for_rows(rows, shape.channels, [&](int64_t begin, int64_t end) {
    WUS_DISPATCH(batch_norm_kernels).apply(op, begin, end, out, bits);
  });
  return {output, mask};
}

// The tensors of a backward pass, checked and dense; op points into them.
struct Backward {
  at::Tensor grad, x, scale, shift;
  int64_t rows;
  BatchNormGrad op;

  Backward(const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& mask,
           const OptionalTensor& scale_, const OptionalTensor& shift_, int64_t act) {
    check_act(act, input);
    x = as_rows(input, "input");
    grad = as_rows(grad_output, "grad_output");
    const int64_t channels = Rows(x).channels, height = extent(x, 2), width = extent(x, 3);
    TORCH_CHECK_VALUE(mask.has_value() == (act == kReluMask || act == kReluMaxPool),
                      "mask must be given for act 1 (bits) and 2 (codes) and not otherwise, got ",
                      mask ? "one" : "none", " with act ", act);
    TORCH_CHECK_VALUE(act != kReluRecompute || (scale_ && shift_),
                      "scale and shift must be given for act 3, which computes the mask again");
    if (act == kReluMaxPool) {
      const int64_t batch = x.size(0), oh = height / 2, ow = width / 2;
      TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef({batch, channels, oh, ow}),
                        "grad_output must be [N, C, H / 2, W / 2] for input of size ", x.sizes(),
                        ", got size ", grad.sizes());
      check_bytes(*mask, "mask", {batch, oh, ow, channels});
    } else {
      check_same_size(grad, "grad_output", x, "input");
      if (mask) check_mask(*mask, x);
    }
    scale = per_channel(scale_, "scale", channels);
    shift = per_channel(shift_, "shift", channels);
    rows = Rows(grad).rows;
    op = {data(grad),  data(x),     mask ? mask->const_data_ptr<uint8_t>() : nullptr,
          data(scale), data(shift), height,
          width,       channels,    static_cast<int>(act)};
  }
};

std::tuple<at::Tensor, at::Tensor> batch_norm_grad_sums(const at::Tensor& grad_output,
                                                        const at::Tensor& input,
                                                        const at::Tensor& mean,
                                                        const OptionalTensor& mask,
                                                        const OptionalTensor& scale,
                                                        const OptionalTensor& shift, int64_t act) {
  const Backward backward(grad_output, input, mask, scale, shift, act);
  const int64_t channels = backward.op.channels;
  const at::Tensor m = per_channel(mean, "mean", channels);
  const at::Tensor sums = sum_over_rows(
      backward.rows, channels, 2 * channels, [&](int64_t begin, int64_t end, double* sum) {
        WUS_DISPATCH(batch_norm_kernels).grad_sums(backward.op, data(m), begin, end, sum);
      });
  return {sums.narrow(0, 0, channels).clone(), sums.narrow(0, channels, channels).clone()};
}

// d loss / d x = gamma * invstd * (g - mean(g) - xhat * mean(g * xhat)) as a * g + b * x + c0.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_grad_coefficients(
    const at::Tensor& sum_grad, const at::Tensor& sum_grad_xmu, const at::Tensor& mean,
    const at::Tensor& invstd, const OptionalTensor& weight, int64_t count) {
  const int64_t channels = mean.numel();
  const at::Tensor sg = per_channel(sum_grad, "sum_grad", channels, at::kDouble);
  const at::Tensor sgx = per_channel(sum_grad_xmu, "sum_grad_xmu", channels, at::kDouble);
  const at::Tensor m = per_channel(mean, "mean", channels);
  const at::Tensor inverse = per_channel(invstd, "invstd", channels);
  const at::Tensor gamma = per_channel(weight, "weight", channels);
  const double *sum = sg.const_data_ptr<double>(), *sum_xmu = sgx.const_data_ptr<double>();
  at::Tensor result = at::empty({5, channels}, m.options());
  float* out = result.data_ptr<float>();
  for (int64_t c = 0; c < channels; ++c) {
    const double invstd_c = data(inverse)[c];
    const double a = gamma.defined() ? data(gamma)[c] * invstd_c : invstd_c;
    const double b = -a * invstd_c * invstd_c * sum_xmu[c] / static_cast<double>(count);
    out[c] = static_cast<float>(a);
    out[channels + c] = static_cast<float>(b);
    out[2 * channels + c] =
        static_cast<float>(-a * sum[c] / static_cast<double>(count) - b * data(m)[c]);
    out[3 * channels + c] = static_cast<float>(sum[c]);
    out[4 * channels + c] = static_cast<float>(sum_xmu[c] * invstd_c);
  }
  return {result[0].clone(), result[1].clone(), result[2].clone(), result[3].clone(),
          result[4].clone()};
}

std::tuple<at::Tensor, at::Tensor> batch_norm_grad_input(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& a,
    const at::Tensor& b, const at::Tensor& c0, const OptionalTensor& mask,
    const OptionalTensor& scale, const OptionalTensor& shift, int64_t act,
    bool need_grad_residual) {
  TORCH_CHECK_VALUE(!need_grad_residual || act == kReluMask,
                    "need_grad_residual needs act 1 (ReLU with a mask), got act ", act);
  const Backward backward(grad_output, input, mask, scale, shift, act);
  const int64_t channels = backward.op.channels;
  const at::Tensor a_ = per_channel(a, "a", channels), b_ = per_channel(b, "b", channels),
                   c_ = per_channel(c0, "c0", channels);
  at::Tensor grad_input = empty_rows(backward.x);
  at::Tensor grad_residual = need_grad_residual ? empty_rows(backward.x) : nothing(backward.x);
  float* out = grad_input.data_ptr<float>();
  float* residual = need_grad_residual ? grad_residual.data_ptr<float>() : nullptr;
  for_rows(backward.rows, channels, [&](int64_t begin, int64_t end) {
    WUS_DISPATCH(batch_norm_kernels)
        .grad_input(backward.op, data(a_), data(b_), data(c_), begin, end, out, residual);
  });
  return {grad_input, grad_residual};
}

TORCH_LIBRARY_IMPL(wus, CPU, m) {
  m.impl("batch_norm_stats", &batch_norm_stats);
  m.impl("batch_norm_scale_shift", &batch_norm_scale_shift);
  m.impl("batch_norm_update_running", &batch_norm_update_running);
  m.impl("batch_norm_apply", &batch_norm_apply);
  m.impl("batch_norm_grad_sums", &batch_norm_grad_sums);
  m.impl("batch_norm_grad_coefficients", &batch_norm_grad_coefficients);
  m.impl("batch_norm_grad_input", &batch_norm_grad_input);
}

}  // namespace
}  // namespace wus::cpu
