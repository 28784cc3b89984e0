#include "chains/act.h"

namespace wus::chains {

Output activate(const Kernels& kernels, const Tensor& input, const Act& act, bool in_place) {
  const auto made = [](Kernels::Two&& both) {
    return Output(std::move(std::get<0>(both)), std::move(std::get<1>(both)));
  };
  if (!act.pool.empty())
    return made(kernels.relu_max_pool.call(input, act.kind == kRelu, act.pool));
  if (act.kind == kNone) return {input, Tensor()};
  if (in_place && !act.smooth()) return made(kernels.activate_.call(input, act.kind, act.slope));
  auto [output, bits] = kernels.activate.call(input, std::nullopt, act.kind, act.slope);
  return {output, act.smooth() ? input : bits};
}

Output masked(const Kernels& kernels, const Tensor& grad, const Tensor& saved, const Act& act,
              const Size& size, bool need_grad, bool need_bias) {
  if (!need_grad && !need_bias) return {};
  if (act.none() && !need_bias) return {grad, Tensor()};
  Tensor passed, grad_bias;
  if (!act.pool.empty()) {
    std::tie(passed, grad_bias) =
        kernels.max_pool_bias_grad.call(grad, saved, size, need_grad, act.pool);
  } else {
    const Tensor none, &mask = act.smooth() ? none : saved, &input = act.smooth() ? saved : none;
    std::tie(passed, grad_bias) = kernels.activate_grad.call(
        grad, optional(mask), optional(input), act.kind, act.slope, need_grad, need_bias);
    if (act.kind == kNone) passed = grad;
  }
  return {passed, need_bias ? grad_bias : Tensor()};
}

Tensor dense(const Tensor& image) {
  constexpr c10::DispatchKeySet kBatched(
      {c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched});
  const bool plain = image.dim() != 4 || image.key_set().has_any(kBatched);
  return image.contiguous(plain ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast);
}

Tensor single(const Tensor& tensor) {
  return !tensor.defined() || tensor.scalar_type() == at::kFloat ? tensor : tensor.to(at::kFloat);
}

}  // namespace wus::chains
