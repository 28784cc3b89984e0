#include "cuda/batch_norm/kernels.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <array>
#include <limits>
#include <optional>
#include <tuple>

#include "common/activation.h"
#include "cuda/elementwise/pool_kernels.h"
#include "cuda/launch.h"

namespace wus::cuda {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// A dense vector with one element a channel.
at::Tensor per_channel(const at::Tensor& t, const char* name, int64_t channels,
                       const at::Device& device) {
  TORCH_CHECK_VALUE(t.device() == device && t.scalar_type() == at::kFloat && t.dim() == 1 &&
                        t.size(0) == channels,
                    name, " must be a ", at::kFloat, " tensor of size [", channels, "] on ", device,
                    ", got ", t.scalar_type(), " of size ", t.sizes(), " on ", t.device());
  return t.contiguous();
}

at::Tensor per_channel(const OptionalTensor& t, const char* name, int64_t channels,
                       const at::Device& device) {
  return t ? per_channel(*t, name, channels, device) : at::Tensor();
}

const float* data(const at::Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }

// Whether a max-pool follows.
bool check_act(int64_t act, at::IntArrayRef pool, const at::Tensor& input) {
  TORCH_CHECK_VALUE(act == kNone || act == kRelu, "act must be 0 (none) or 1 (ReLU) on a GPU, got ",
                    act);
  if (pool.empty()) return false;
  check_pool(pool);
  check_poolable(input);
  return true;
}

void check_like(const at::Tensor& t, const char* name, const at::Tensor& input) {
  TORCH_CHECK_VALUE(t.scalar_type() == input.scalar_type() && t.device() == input.device(), name,
                    " must be ", input.scalar_type(), " on ", input.device(), " as input is, got ",
                    t.scalar_type(), " on ", t.device());
}

int64_t extent(const at::Tensor& x, int64_t dim) { return x.dim() == 4 ? x.size(dim) : 1; }

// Statistics of rows, and what is made of them.
void run_stats(const at::Tensor& x, const NormStats& out) {
  const Rows shape(x);
  at::Tensor partial =
      at::empty({norm_partial_sums(shape.rows, shape.channels)}, x.options().dtype(at::kDouble));
  WUS_DISPATCH_DTYPE(x.scalar_type(), "batch_norm_stats", [&] {
    norm_stats(x.const_data_ptr<scalar_t>(), partial.data_ptr<double>(), out, shape.rows,
               shape.channels, c10::cuda::getCurrentCUDAStream());
  });
}

std::tuple<at::Tensor, at::Tensor> batch_norm_stats(const at::Tensor& input) {
  check_float(input, "input");
  const c10::cuda::CUDAGuard guard(input.device());
  const at::Tensor x = as_rows(input, "input");
  const int64_t channels = Rows(x).channels;
  const auto floats = x.options().dtype(at::kFloat);
  if (x.numel() == 0) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    return {at::full({channels}, nan, floats), at::full({channels}, nan, floats)};
  }
  at::Tensor mean = at::empty({channels}, floats), var = at::empty_like(mean);
  run_stats(x, {.mean = mean.data_ptr<float>(), .var = var.data_ptr<float>()});
  return {mean, var};
}

float* running(const OptionalTensor& t, const char* name, int64_t channels,
               const at::Device& device) {
  if (!t) return nullptr;
  per_channel(*t, name, channels, device);
  TORCH_CHECK_VALUE(t->is_contiguous(), name, " must be contiguous");
  return t->data_ptr<float>();
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_train(
    const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, double momentum,
    double eps, const OptionalTensor& offset) {
  check_float(input, "input");
  const at::Device device = input.device();
  const c10::cuda::CUDAGuard guard(device);
  const at::Tensor x = as_rows(input, "input");
  TORCH_CHECK_VALUE(running_mean.has_value() == running_var.has_value(),
                    "running_mean and running_var must be given together");
  const int64_t channels = Rows(x).channels;
  const at::Tensor gamma = per_channel(weight, "weight", channels, device),
                   beta = per_channel(bias, "bias", channels, device),
                   short_of = per_channel(offset, "offset", channels, device);
  at::Tensor mean = at::empty({channels}, x.options().dtype(at::kFloat));
  at::Tensor scale = at::empty_like(mean), shift = at::empty_like(mean),
             invstd = at::empty_like(mean);
  if (x.numel() == 0) {
    for (const at::Tensor& made : {mean, scale, shift, invstd})
      made.fill_(std::numeric_limits<double>::quiet_NaN());
    return {mean, scale, shift, invstd};
  }
  run_stats(x, {.mean = mean.data_ptr<float>(),
                .var = nullptr,
                .affine = {data(gamma), data(beta), eps, scale.data_ptr<float>(),
                           shift.data_ptr<float>(), invstd.data_ptr<float>()},
                .offset = data(short_of),
                .running_mean = running(running_mean, "running_mean", channels, device),
                .running_var = running(running_var, "running_var", channels, device),
                .momentum = momentum});
  return {mean, scale, shift, invstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_scale_shift(const at::Tensor& mean,
                                                                      const at::Tensor& var,
                                                                      const OptionalTensor& weight,
                                                                      const OptionalTensor& bias,
                                                                      double eps) {
  const c10::cuda::CUDAGuard guard(mean.device());
  const int64_t channels = mean.numel();
  const at::Device device = mean.device();
  const at::Tensor m = per_channel(mean, "mean", channels, device);
  const at::Tensor v = per_channel(var, "var", channels, device);
  const at::Tensor gamma = per_channel(weight, "weight", channels, device);
  const at::Tensor beta = per_channel(bias, "bias", channels, device);
  at::Tensor scale = at::empty_like(m), shift = at::empty_like(m), invstd = at::empty_like(m);
  if (channels) {
    norm_scale_shift(data(m), data(v),
                     {data(gamma), data(beta), eps, scale.data_ptr<float>(),
                      shift.data_ptr<float>(), invstd.data_ptr<float>()},
                     channels, c10::cuda::getCurrentCUDAStream());
  }
  return {scale, shift, invstd};
}

std::tuple<at::Tensor, at::Tensor> batch_norm_apply(const at::Tensor& input,
                                                    const OptionalTensor& scale,
                                                    const at::Tensor& shift,
                                                    const OptionalTensor& residual, int64_t act,
                                                    double /*slope*/, at::IntArrayRef pool,
                                                    bool need_mask) {
  check_float(input, "input");
  const bool pooled = check_act(act, pool, input);
  const c10::cuda::CUDAGuard guard(input.device());
  const at::Tensor x = as_rows(input, "input");
  const Rows shape(x);
  const at::Tensor s = per_channel(scale, "scale", shape.channels, x.device());
  const at::Tensor t = per_channel(shift, "shift", shape.channels, x.device());
  const Affine affine = {data(s), data(t)};
  at::Tensor added;
  if (residual) {
    TORCH_CHECK_VALUE(!pooled, "residual needs no pool, got pool ", pool);
    check_like(*residual, "residual", x);
    added = as_rows(*residual, "residual");
    check_same_size(added, "residual", x, "input");
  }
  const auto stream = c10::cuda::getCurrentCUDAStream();
  if (pooled) {
    const int64_t batch = x.size(0), height = x.size(2), width = x.size(3);
    at::Tensor output = at::empty({batch, shape.channels, height / 2, width / 2},
                                  x.options().memory_format(at::MemoryFormat::ChannelsLast));
    at::Tensor code =
        at::empty({batch, height / 2, width / 2, shape.channels}, x.options().dtype(at::kByte));
    if (output.numel() == 0) return {output, code};
    WUS_DISPATCH_DTYPE(x.scalar_type(), "batch_norm_apply", [&] {
      cuda::relu_max_pool(x.const_data_ptr<scalar_t>(), affine, height, width, act == kRelu,
                          output.data_ptr<scalar_t>(), code.data_ptr<uint8_t>(), Rows(output).rows,
                          shape.channels, stream);
    });
    return {output, code};
  }
  at::Tensor output = empty_rows(x);
  const bool bits = act == kRelu && need_mask;
  at::Tensor mask = bits ? empty_mask(x) : at::empty({0}, x.options().dtype(at::kByte));
  if (x.numel() == 0) return {output, mask};
  WUS_DISPATCH_DTYPE(x.scalar_type(), "batch_norm_apply", [&] {
    relu(x.const_data_ptr<scalar_t>(), affine,
         added.defined() ? added.const_data_ptr<scalar_t>() : nullptr, act != kNone,
         output.data_ptr<scalar_t>(), bits ? mask.data_ptr<uint8_t>() : nullptr, shape.rows,
         shape.channels, stream);
  });
  return {output, mask};
}

// The tensors of a backward pass, checked and dense.
struct Backward {
  at::Tensor grad, x, mask, scale, shift;
  int64_t channels;
  bool relu, pooled;

  Backward(const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& mask_,
           const OptionalTensor& scale_, const OptionalTensor& shift_, int64_t act,
           at::IntArrayRef pool)
      : relu(act == kRelu) {
    check_float(input, "input");
    pooled = check_act(act, pool, input);
    check_like(grad_output, "grad_output", input);
    x = as_rows(input, "input");
    grad = as_rows(grad_output, "grad_output");
    channels = Rows(x).channels;
    TORCH_CHECK_VALUE(!mask_ || relu || pooled, "mask must be given for ReLU or a pool only");
    TORCH_CHECK_VALUE(mask_ || !pooled, "mask must be given for pool ", pool, ": the codes");
    TORCH_CHECK_VALUE(mask_ || !relu || (scale_ && shift_),
                      "mask, or scale and shift, must be given for act ", act, ", got neither");
    if (pooled) {
      const int64_t batch = x.size(0), oh = x.size(2) / 2, ow = x.size(3) / 2;
      TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef({batch, channels, oh, ow}),
                        "grad_output must be [N, C, H / 2, W / 2] for input of size ", x.sizes(),
                        ", got size ", grad.sizes());
      check_bytes(*mask_, "mask", {batch, oh, ow, channels}, x.device());
    } else {
      check_same_size(grad, "grad_output", x, "input");
      if (mask_) check_mask(*mask_, x);
    }
    if (mask_) mask = *mask_;
    scale = per_channel(scale_, "scale", channels, x.device());
    shift = per_channel(shift_, "shift", channels, x.device());
  }

  template <class T>
  NormGrad<T> op() const {
    return {grad.const_data_ptr<T>(),
            x.const_data_ptr<T>(),
            mask.defined() ? mask.const_data_ptr<uint8_t>() : nullptr,
            {data(scale), data(shift)},
            extent(x, 2),
            extent(x, 3),
            Rows(grad).rows,
            channels,
            relu,
            pooled};
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_grad_coefficients(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mean,
    const at::Tensor& invstd, const OptionalTensor& weight, const OptionalTensor& mask,
    const OptionalTensor& scale, const OptionalTensor& shift, int64_t act, double /*slope*/,
    at::IntArrayRef pool) {
  const c10::cuda::CUDAGuard guard(input.device());
  const Backward backward(grad_output, input, mask, scale, shift, act, pool);
  const int64_t channels = backward.channels;
  const at::Device device = input.device();
  const at::Tensor m = per_channel(mean, "mean", channels, device),
                   inverse = per_channel(invstd, "invstd", channels, device),
                   gamma = per_channel(weight, "weight", channels, device);
  std::array<at::Tensor, 5> made;
  const bool empty = backward.grad.numel() == 0;
  for (at::Tensor& tensor : made) tensor = empty ? at::zeros_like(m) : at::empty_like(m);
  if (empty) return {made[0], made[1], made[2], made[3], made[4]};
  const int64_t rows = Rows(backward.grad).rows;
  at::Tensor partial =
      at::empty({norm_partial_sums(rows, channels)}, m.options().dtype(at::kDouble));
  WUS_DISPATCH_DTYPE(backward.x.scalar_type(), "batch_norm_grad_coefficients", [&] {
    norm_grad_coefficients(
        backward.op<scalar_t>(), data(m), data(inverse), data(gamma),
        static_cast<double>(Rows(backward.x).rows), partial.data_ptr<double>(),
        {made[0].data_ptr<float>(), made[1].data_ptr<float>(), made[2].data_ptr<float>(),
         made[3].data_ptr<float>(), made[4].data_ptr<float>()},
        c10::cuda::getCurrentCUDAStream());
  });
  return {made[0], made[1], made[2], made[3], made[4]};
}

std::tuple<at::Tensor, at::Tensor> batch_norm_grad_input(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& a,
    const at::Tensor& b, const at::Tensor& c0, const OptionalTensor& mask,
    const OptionalTensor& scale, const OptionalTensor& shift, int64_t act, double /*slope*/,
    at::IntArrayRef pool, bool need_grad_residual) {
  TORCH_CHECK_VALUE(!need_grad_residual || (mask && pool.empty()),
                    "need_grad_residual needs a mask of bits and no pool, got act ", act,
                    " and pool ", pool);
  const c10::cuda::CUDAGuard guard(input.device());
  const Backward backward(grad_output, input, mask, scale, shift, act, pool);
  const int64_t channels = backward.channels;
  const at::Device device = input.device();
  const at::Tensor a_ = per_channel(a, "a", channels, device),
                   b_ = per_channel(b, "b", channels, device),
                   c_ = per_channel(c0, "c0", channels, device);
  at::Tensor grad_input = empty_rows(backward.x);
  at::Tensor grad_residual = need_grad_residual ? empty_rows(backward.x) : nothing(backward.x);
  if (backward.grad.numel() == 0) return {grad_input, grad_residual};
  WUS_DISPATCH_DTYPE(backward.x.scalar_type(), "batch_norm_grad_input", [&] {
    norm_grad_input(backward.op<scalar_t>(), data(a_), data(b_), data(c_),
                    grad_input.data_ptr<scalar_t>(),
                    need_grad_residual ? grad_residual.data_ptr<scalar_t>() : nullptr,
                    c10::cuda::getCurrentCUDAStream());
  });
  return {grad_input, grad_residual};
}

TORCH_LIBRARY_IMPL(wus, CUDA, m) {
  m.impl("batch_norm_stats", &batch_norm_stats);
  m.impl("batch_norm_scale_shift", &batch_norm_scale_shift);
  m.impl("batch_norm_train", &batch_norm_train);
  m.impl("batch_norm_apply", &batch_norm_apply);
  m.impl("batch_norm_grad_coefficients", &batch_norm_grad_coefficients);
  m.impl("batch_norm_grad_input", &batch_norm_grad_input);
}

}  // namespace
}  // namespace wus::cuda
