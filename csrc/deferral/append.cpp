#include "deferral/append.h"

#include <ATen/native/Pool.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>
#include <mutex>
#include <utility>

#include "common/activation.h"
#include "deferral/deferred.h"
#include "deferral/session.h"

namespace wus::deferral {
namespace {

// While it is held no other thread computes a tensor of this thread's session, or extends it.
std::unique_lock<std::recursive_mutex> hold_session() {
  Session* session = Session::current();
  return session == nullptr ? std::unique_lock<std::recursive_mutex>() : locked(session->mutex);
}

// The chain behind a tensor, if a step may be appended to it now.
std::shared_ptr<Chain> open_chain(const at::Tensor& tensor) {
  const Deferred* deferred = as_deferred(tensor);
  const Session* session = Session::current();
  if (deferred == nullptr || session == nullptr) return nullptr;
  const auto chain = deferred->chain();
  if (chain == nullptr) return nullptr;  // another thread has computed it just now
  const bool open = chain->session().get() == session && !chain->has_run() &&
                    !deferred->is_observed() && session->undisturbed();
  return open ? chain : nullptr;
}

at::Tensor with(const at::Tensor& self, const std::shared_ptr<Chain>& chain, Step step,
                std::vector<int64_t> sizes, at::MemoryFormat format, bool in_place) {
  auto next = chain->extended(std::move(step), std::move(sizes), format);
  if (!in_place) return defer(std::move(next));
  next->session()->add(next);
  as_deferred(self)->become(std::move(next));
  return self;
}

// The layout that torch's convolutions give: channels_last where either suggests it.
at::MemoryFormat format_of(const at::Tensor& tensor) {
  return tensor.dim() == 4 ? tensor.suggest_memory_format() : at::MemoryFormat::Contiguous;
}

// The layout that torch's element-wise operators give: contiguous where both are the same.
at::MemoryFormat elementwise(at::MemoryFormat format, const std::vector<int64_t>& sizes) {
  const bool same = sizes.size() == 4 && (sizes[1] == 1 || sizes[2] * sizes[3] == 1);
  return same ? at::MemoryFormat::Contiguous : format;
}

// Of a tensor, as they see it: the stride of a single image says nothing.
at::MemoryFormat elementwise(const at::Tensor& tensor) {
  if (tensor.dim() != 4) return at::MemoryFormat::Contiguous;
  auto strides = tensor.strides().vec();
  if (tensor.size(0) == 1) strides[0] = std::numeric_limits<int64_t>::max();
  return c10::is_channels_last_strides_2d(tensor.sizes(), strides) ? at::MemoryFormat::ChannelsLast
                                                                   : at::MemoryFormat::Contiguous;
}

// Whether what an element-wise operator makes of a tensor, which comes first, may be in a layout
// that does not follow from the tensor's own.
bool is_permuted(const at::Tensor& tensor) {
  if (tensor.dim() != 4 || elementwise(tensor) == at::MemoryFormat::ChannelsLast) return false;
  int64_t outer = std::numeric_limits<int64_t>::max();
  for (int64_t dim = 0; dim < 4; ++dim) {
    if (tensor.size(dim) == 1) continue;
    if (tensor.stride(dim) == 0 || tensor.stride(dim) > outer) return true;
    outer = tensor.stride(dim);
  }
  return false;
}

bool requires_grad(const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }

bool on_cpu(const Chain& chain) { return chain.call().device.is_cpu(); }

Read read(const std::optional<at::Tensor>& tensor) { return Read(tensor.value_or(at::Tensor())); }

// A chain of nothing yet, behind an image that is there.
std::shared_ptr<Chain> behind(const at::Tensor& image, pybind11::object layer) {
  Session* session = Session::current();
  if (session == nullptr || !session->undisturbed() || as_deferred(image) || !is_plain(image) ||
      image.dim() != 4 || format_of(image) != at::MemoryFormat::ChannelsLast ||
      !image.is_contiguous(at::MemoryFormat::ChannelsLast))
    return nullptr;
  const bool differentiable = at::GradMode::is_enabled() && image.requires_grad();
  auto call = std::make_shared<Call>(Call{session->shared_from_this(), std::move(layer),
                                          pybind11::none(), Read(image), Read(), Read(), false,
                                          image.scalar_type(), image.device()});
  return std::make_shared<Chain>(std::move(call), Kind::CONV, image.sizes().vec(),
                                 at::MemoryFormat::ChannelsLast, differentiable,
                                 depth_behind({image}));
}

}  // namespace

std::optional<at::Tensor> begin_chain(pybind11::object layer, pybind11::object plan, bool is_conv,
                                      const at::Tensor& input, const at::Tensor& weight,
                                      const std::optional<at::Tensor>& bias, bool weight_trains,
                                      std::vector<int64_t> sizes, at::ScalarType dtype) {
  Session* session = Session::current();
  if (session == nullptr || !session->undisturbed()) return std::nullopt;
  at::Tensor value = input;
  at::MemoryFormat format = at::MemoryFormat::Contiguous;
  if (Deferred* deferred = as_deferred(input)) {
    const auto chain = deferred->chain();
    if (chain == nullptr || chain->session().get() != session) return std::nullopt;
    format = chain->format();
    value = deferred->value();
  } else {
    if (!is_plain(input)) return std::nullopt;
    format = format_of(input);
  }
  if (is_conv && format_of(weight) == at::MemoryFormat::ChannelsLast)
    format = at::MemoryFormat::ChannelsLast;
  const at::Tensor shift = bias.value_or(at::Tensor());
  const bool differentiable =
      at::GradMode::is_enabled() &&
      (requires_grad(value) || requires_grad(shift) || (weight_trains && weight.requires_grad()));
  const uint64_t depth = depth_behind({value, shift, weight});
  auto call = std::make_shared<Call>(Call{session->shared_from_this(), std::move(layer),
                                          std::move(plan), Read(value), Read(weight), Read(shift),
                                          weight_trains, dtype, weight.device()});
  const auto lock = hold_session();
  return defer(std::make_shared<Chain>(std::move(call), is_conv ? Kind::CONV : Kind::LINEAR,
                                       std::move(sizes), format, differentiable, depth));
}

std::optional<at::Tensor> append_norm(const at::Tensor& input, const NormArguments& norm) {
  const auto lock = hold_session();
  auto chain = open_chain(input);
  if (chain == nullptr && norm.layer) chain = behind(input, norm.layer);
  if (chain == nullptr || !chain->has(Kind::CONV)) return std::nullopt;
  if (chain->call().is_given() && !norm.batch) return std::nullopt;
  for (const Kind kind : {Kind::NORM, Kind::ADD, Kind::ACT, Kind::POOL}) {
    if (chain->has(kind)) return std::nullopt;
  }
  const auto& sizes = chain->sizes();
  for (const auto* tensor : {&norm.weight, &norm.bias, &norm.running_mean, &norm.running_var}) {
    if (!tensor->has_value() || !(*tensor)->defined()) continue;
    const at::Tensor& t = **tensor;
    if (as_deferred(t) || !is_plain(t) ||
        (t.scalar_type() != at::kFloat && t.scalar_type() != chain->dtype()) || t.dim() != 1 ||
        t.size(0) != sizes[1] || t.device() != chain->call().device)
      return std::nullopt;
  }
  const bool statistics = norm.running_mean && norm.running_mean->defined();
  if (!norm.batch && (!statistics || !norm.running_var || !norm.running_var->defined()))
    return std::nullopt;
  if (sizes[0] * sizes[2] * sizes[3] <= 1 && norm.batch) return std::nullopt;
  const bool gamma = norm.weight && requires_grad(*norm.weight) && !norm.constant;
  if (!norm.batch) {
    // What trains cannot be folded away. In a window gamma changes also between two evaluations,
    // which share what was folded; without a count of batches running statistics are known not at
    // all to have stood still.
    const bool trains =
        chain->call().weight_trains && chain->call().weight.unchecked().requires_grad();
    if (!norm.batches || (gamma && !chain->call().weight_trains) ||
        (at::GradMode::is_enabled() && (gamma || trains)))
      return std::nullopt;
  }
  Session* session = Session::current();
  if (statistics && norm.batch) session->before_use(*norm.running_mean, true);
  if (chain->has_run()) return std::nullopt;
  auto step = std::make_shared<Norm>(
      Norm{read(norm.weight), read(norm.bias), read(norm.running_mean), read(norm.running_var),
           read(norm.batches), norm.constant, norm.batch, norm.momentum, norm.eps});
  if (norm.counts && norm.batches) {
    c10::impl::ExcludeDispatchKeyGuard through(kKey);
    norm.batches->add_(1);
  }
  return with(input, chain, Step{.kind = Kind::NORM, .norm = std::move(step)}, sizes,
              chain->format(), false);
}

std::optional<at::Tensor> append_sum(const at::Tensor& self, const at::Tensor& other,
                                     const at::Scalar& alpha, bool in_place) {
  if (self.is_same(other) || !alpha.isIntegral(true) || alpha.toLong() != 1) return std::nullopt;
  auto lock = hold_session();
  const auto takes = [](const at::Tensor& tensor) {
    auto chain = open_chain(tensor);
    const bool fits = chain != nullptr && chain->has(Kind::CONV) && !chain->has(Kind::ADD) &&
                      !chain->has(Kind::ACT) && !chain->has(Kind::POOL);
    return fits ? chain : nullptr;
  };
  const bool first = in_place || takes(self) != nullptr;
  const at::Tensor& summand = first ? self : other;
  const at::Tensor& residual = first ? other : self;
  if (!first && as_deferred(residual) == nullptr && is_permuted(residual)) return std::nullopt;
  if (takes(summand) == nullptr || !residual.defined() || residual.sizes() != summand.sizes() ||
      residual.scalar_type() != summand.scalar_type() || residual.device() != summand.device())
    return std::nullopt;
  at::MemoryFormat other_format;
  at::Tensor value = residual;
  if (Deferred* deferred = as_deferred(residual)) {
    const auto chain = deferred->chain();
    if (chain == nullptr) return std::nullopt;
    other_format = chain->format();
    lock = {};  // it may be of a session of which another thread waits for this one
    value = deferred->value();
    lock = hold_session();
  } else {
    if (!is_plain(residual)) return std::nullopt;
    other_format = elementwise(residual);
  }
  // What was computed just now may have been derived from this very chain.
  const auto chain = takes(summand);
  if (chain == nullptr || (in_place && chain->has_live_children())) return std::nullopt;
  const auto format = in_place
                          ? chain->format()
                          : elementwise(first ? chain->format() : other_format, chain->sizes());
  return with(self, chain, Step{Kind::ADD, Read(value)}, chain->sizes(), format, in_place);
}

std::optional<at::Tensor> append_activation(const at::Tensor& self, const Act& act, bool in_place) {
  const auto lock = hold_session();
  const auto chain = open_chain(self);
  if (chain == nullptr || chain->has(Kind::ACT) || (in_place && chain->has_live_children()))
    return std::nullopt;
  // ReLU and max-pooling may come in either order.
  if (act.kind != kRelu && (chain->has(Kind::POOL) || !on_cpu(*chain))) return std::nullopt;
  // A smooth one's input is computed again from the norm's, or saved.
  if (!has_bits(act.kind) && chain->has(Kind::ADD)) return std::nullopt;
  const auto format = in_place ? chain->format() : elementwise(chain->format(), chain->sizes());
  return with(self, chain, Step{.kind = Kind::ACT, .act = act}, chain->sizes(), format, in_place);
}

std::optional<at::Tensor> append_pool(const at::Tensor& self, const Pool& pool) {
  const auto lock = hold_session();
  const auto chain = open_chain(self);
  if (chain == nullptr || !chain->has(Kind::CONV) || chain->has(Kind::ADD) ||
      chain->has(Kind::POOL) || (chain->act().kind != kNone && chain->act().kind != kRelu))
    return std::nullopt;
  constexpr int64_t kMostKernel = 15;
  const bool plain = pool.kernel == 2 && pool.stride == 2 && pool.padding == 0 && !pool.ceil;
  if (on_cpu(*chain) ? pool.kernel < 2 || pool.kernel > kMostKernel || pool.stride < 1 ||
                           pool.padding < 0 || pool.padding > pool.kernel / 2
                     : !plain || chain->act().kind != kRelu)
    return std::nullopt;
  auto sizes = chain->sizes();
  for (const int dim : {2, 3}) {
    sizes[dim] = at::native::pooling_output_shape<int64_t>(sizes[dim], pool.kernel, pool.padding,
                                                           pool.stride, /*dilation=*/1, pool.ceil);
    if (sizes[dim] < 1) return std::nullopt;
  }
  return with(self, chain, Step{.kind = Kind::POOL, .pool = pool}, std::move(sizes),
              chain->format(), false);
}

std::optional<at::Tensor> append_dropout(const at::Tensor& input, double p) {
  const auto lock = hold_session();
  const auto chain = open_chain(input);
  if (chain == nullptr || !chain->has(Kind::LINEAR) || chain->act().kind != kRelu ||
      chain->has(Kind::DROPOUT) || !on_cpu(*chain))
    return std::nullopt;
  // Drawn now, in stock's order; the chain applies them when it runs.
  c10::impl::ExcludeDispatchKeyGuard through(kKey);
  at::NoGradGuard no_grad;
  at::Tensor noise = at::empty(chain->sizes(), at::TensorOptions().dtype(chain->dtype()));
  noise.bernoulli_(1 - p);
  return with(input, chain, Step{Kind::DROPOUT, Read(std::move(noise)), p}, chain->sizes(),
              chain->format(), false);
}

}  // namespace wus::deferral
