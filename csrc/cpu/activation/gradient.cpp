#include "cpu/activation/gradient.h"

#include "cpu/parallel_rows.h"

namespace wus::cpu {

void check_act(int64_t act) {
  TORCH_CHECK_VALUE(act >= kNone && act < kActivations,
                    "act must be 0 (none), 1 (ReLU), 2 (ReLU6), 3 (leaky ReLU), 4 (hardsigmoid), "
                    "5 (hardswish), 6 (SiLU), 7 (sigmoid), 8 (GELU) or 9 (GELU by tanh), got ",
                    act);
}

at::Tensor per_channel(const at::Tensor& t, const char* name, int64_t channels,
                       at::ScalarType type) {
  TORCH_CHECK_VALUE(
      t.device().is_cpu() && t.scalar_type() == type && t.dim() == 1 && t.size(0) == channels, name,
      " must be a ", type, " tensor of size [", channels, "] on the CPU, got ", t.scalar_type(),
      " of size ", t.sizes(), " on ", t.device());
  return t.contiguous();
}

at::Tensor per_channel(const std::optional<at::Tensor>& t, const char* name, int64_t channels) {
  return t ? per_channel(*t, name, channels) : at::Tensor();
}

template <class T>
PassedGradient<T>::PassedGradient(const at::Tensor& grad_output,
                                  const std::optional<at::Tensor>& mask,
                                  const std::optional<at::Tensor>& x, const char* x_name,
                                  const at::Tensor& scale, const at::Tensor& shift, int64_t act,
                                  double slope)
    : grad(as_rows<T>(grad_output, "grad_output")), scale_(scale), shift_(shift) {
  check_act(act);
  const Rows shape(grad);
  rows = shape.rows;
  if (mask) {
    TORCH_CHECK_VALUE(has_bits(static_cast<int>(act)),
                      "mask must be given for act 1 to 4 only, got one with act ", act);
    check_mask(*mask, grad);
    mask_ = *mask;
  } else {
    TORCH_CHECK_VALUE(act == kNone || x, "mask (of act 1 to 4) or ", x_name,
                      " must be given for act ", act, ", got neither");
  }
  if (x) {
    x_ = as_rows<T>(*x, x_name);
    check_same_size(grad, "grad_output", x_, x_name);
  }
  op = {data<T>(grad),         mask_.defined() ? mask_.const_data_ptr<uint8_t>() : nullptr,
        data<T>(x_),           data(scale_),
        data(shift_),          shape.channels,
        static_cast<int>(act), static_cast<float>(slope)};
}

namespace {

at::Tensor row_of(const std::optional<at::Tensor>& norm, int64_t row) {
  return norm && norm->dim() == 2 && norm->size(0) == 5 ? norm->select(0, row).contiguous()
                                                        : at::Tensor();
}

}  // namespace

template <class T>
PassedGradient<T>::PassedGradient(const at::Tensor& grad_output,
                                  const std::optional<at::Tensor>& mask,
                                  const std::optional<at::Tensor>& z,
                                  const std::optional<at::Tensor>& norm, int64_t act, double slope)
    : PassedGradient(grad_output, mask, z, "z", row_of(norm, 3), row_of(norm, 4), act, slope) {
  if (!norm) return;
  check_float(*norm, "batch_norm");
  const int64_t channels = op.channels;
  TORCH_CHECK_VALUE(z, "z must be given with batch_norm");
  TORCH_CHECK_VALUE(
      norm->dim() == 2 && (norm->size(0) == 3 || norm->size(0) == 5) && norm->size(1) == channels,
      "batch_norm must be a, b, c [3, ", channels, "], or with scale and shift [5, ", channels,
      "], got size ", norm->sizes());
  TORCH_CHECK_VALUE(act == kNone || mask || norm->size(0) == 5,
                    "batch_norm needs scale and shift, [5, ", channels, "], for act ", act,
                    " without a mask, got size ", norm->sizes());
  rows_ = norm->contiguous();
  coefficients_ = {data(rows_), data(rows_) + channels, data(rows_) + 2 * channels};
}

template <class T>
at::Tensor PassedGradient<T>::sum() const {
  return sum_over_rows(rows, op.channels, op.channels,
                       [&](int64_t begin, int64_t end, double* sums) {
                         WUS_DISPATCH(activation_kernels<T>())
                             .grad_sums(op, nullptr, begin, end, sums, nullptr);
                       })
      .to(at::kFloat);
}

template class PassedGradient<float>;
template class PassedGradient<Bf16>;

}  // namespace wus::cpu
