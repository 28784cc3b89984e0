#include "deferral/stock.h"

#include <ATen/Context.h>
#include <ATen/ops/add.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/div.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/hardsigmoid.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/hardtanh.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>

#include "common/activation.h"

namespace wus::deferral {
namespace {

at::Tensor activated(const at::Tensor& input, const Act& act) {
  switch (act.kind) {
    case kRelu:
      return at::relu(input);
    case kRelu6:
      return at::hardtanh(input, 0, 6);
    case kLeakyRelu:
      return at::leaky_relu(input, act.slope);
    case kHardsigmoid:
      return at::hardsigmoid(input);
    case kHardswish:
      return at::hardswish(input);
    case kSilu:
      return at::silu(input);
    case kSigmoid:
      return at::sigmoid(input);
    case kGelu:
      return at::gelu(input, "none");
    case kGeluTanh:
      return at::gelu(input, "tanh");
    default:
      TORCH_INTERNAL_ASSERT(false, "no such activation: ", act.kind);
  }
}

at::Tensor normalised(const at::Tensor& input, const Norm& norm) {
  norm.done = true;
  const at::Tensor& weight = norm.weight.get("norm's weight");
  return at::batch_norm(input, norm.constant && weight.defined() ? weight.detach() : weight,
                        norm.bias.get("norm's bias"), norm.running_mean.unchecked(),
                        norm.running_var.unchecked(), norm.batch, norm.momentum, norm.eps,
                        at::globalContext().userEnabledCuDNN());
}

}  // namespace

at::Tensor stock(const at::Tensor& input, const Step& step) {
  switch (step.kind) {
    case Kind::NORM:
      return normalised(input, *step.norm);
    case Kind::ADD:
      return at::add(input, step.tensor.get("other summand"));
    case Kind::ACT:
      return activated(input, step.act);
    case Kind::POOL: {
      const Pool& pool = step.pool;
      return at::max_pool2d(input, pool.kernel, pool.stride, pool.padding, 1, pool.ceil);
    }
    case Kind::DROPOUT:
      return at::mul(input, at::div(step.tensor.get("noise"), 1 - step.p));
    default:
      TORCH_INTERNAL_ASSERT(false, "a layer begins a chain");
  }
}

}  // namespace wus::deferral
