#include "chains/norm.h"

#include "chains/act.h"

namespace wus::chains {
namespace {

// Running statistics in float32, which is written back where they are of another type.
class Running {
 public:
  explicit Running(const BatchNorm& norm) : norm_(norm) {
    if (!norm.running_mean.defined() || !norm.running_var.defined()) return;
    mean = single(norm.running_mean);
    var = single(norm.running_var);
  }

  void write_back() const {
    if (!mean || mean->is_same(norm_.running_mean)) return;
    norm_.running_mean.copy_(*mean);
    norm_.running_var.copy_(*var);
  }

  OptionalTensor mean, var;

 private:
  const BatchNorm& norm_;
};

}  // namespace

Normed normed(const Kernels& kernels, const Tensor& z, const BatchNorm& norm,
              const OptionalTensor& offset) {
  const Running running(norm);
  auto [mean, scale, shift, invstd] =
      kernels.train.call(z, optional(norm.weight), optional(norm.bias), running.mean, running.var,
                         norm.momentum, norm.eps, offset);
  running.write_back();
  return {z, mean, scale, shift, invstd};
}

Normed normed(const Kernels& kernels, const Tensor& z, const Tensor& mean, const Tensor& var,
              const BatchNorm& norm) {
  const Running running(norm);
  if (running.mean) {
    kernels.update_running.call(*running.mean, *running.var, mean, var, norm.momentum,
                                z.numel() / z.size(1));
    running.write_back();
  }
  auto [scale, shift, invstd] =
      kernels.scale_shift.call(mean, var, optional(norm.weight), optional(norm.bias), norm.eps);
  return {z, mean, scale, shift, invstd};
}

}  // namespace wus::chains
