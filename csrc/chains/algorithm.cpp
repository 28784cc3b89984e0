#include "chains/algorithm.h"

#include <ATen/ops/add.h>

namespace wus::chains {

Output Unfused::forward(const Tensor& input, const Tensor& bias, const Act& act) {
  return activate(kernels, convolve(input, bias), act);
}

Output Unfused::forward_add(const Tensor& input, const Tensor& bias, const Tensor& residual,
                            const Act& act) {
  const Tensor output = convolve(input, bias);
  if (act.none()) return {output.add_(residual), Tensor()};
  auto [activated, bits] = kernels.activate.call(output, residual, act.kind, act.slope);
  return {activated, bits};
}

Normed Unfused::forward_norm(const Tensor& input, const Tensor& bias, const BatchNorm& norm) {
  return normed(kernels, convolve(input, bias), norm);
}

Gradients Unfused::backward(const Tensor& grad, const Tensor& saved, const Act& act,
                            bool need_input, bool need_bias, const Trained& trained) {
  const bool need_grad = need_input || trained;
  auto [passed, grad_bias] = masked(kernels, grad, saved, act, output_size_, need_grad, need_bias);
  if (!need_grad) return {Tensor(), grad_bias, Tensor()};
  return {need_input ? dgrad(passed) : Tensor(), grad_bias,
          trained ? wgrad(passed, trained) : Tensor()};
}

std::tuple<Tensor, Tensor, Tensor> Unfused::backward_norm(const Tensor& grad, const Tensor& z,
                                                          const NormGrad& norm, const Tensor& mask,
                                                          const Act& act, bool need_input,
                                                          bool need_residual,
                                                          const Trained& trained) {
  if (!need_input && !trained)
    return {Tensor(), masked(kernels, grad, mask, act, output_size_, true, false).first, Tensor()};
  const bool apart = need_residual && !act.none();
  const auto [grad_z, grad_residual] =
      kernels.grad_input.call(grad, z, norm.a, norm.b, norm.c, optional(mask), optional(norm.scale),
                              optional(norm.shift), act.kind, act.slope, act.pool, apart);
  return {need_input ? dgrad(grad_z) : Tensor(), apart ? grad_residual : grad,
          trained ? wgrad(grad_z, trained) : Tensor()};
}

Output Given::forward(const Tensor& input, const Tensor& bias, const Act& act) {
  return activate(kernels, input, act, /*in_place=*/false);
}

Output Given::forward_add(const Tensor& input, const Tensor& bias, const Tensor& residual,
                          const Act& act) {
  if (act.none()) return {at::add(input, residual), Tensor()};
  auto [activated, bits] = kernels.activate.call(input, residual, act.kind, act.slope);
  return {activated, bits};
}

Tensor Given::wgrad(const Tensor& grad, const Trained& trained) {
  TORCH_INTERNAL_ASSERT(false, "a convolution that ran by itself has a backward of its own");
}

}  // namespace wus::chains
