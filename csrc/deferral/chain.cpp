#include "deferral/chain.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <initializer_list>
#include <utility>

#include "deferral/deferred.h"
#include "deferral/session.h"
#include "deferral/stock.h"

namespace wus::deferral {
namespace py = pybind11;

Read::Read(at::Tensor tensor) : tensor_(std::move(tensor)) {
  if (!tensor_.defined()) return;
  if (tensor_.has_storage()) data_ = tensor_.storage().data();
  if (!tensor_.is_inference()) version_ = tensor_._version();
}

const at::Tensor& Read::get(const char* what) const {
  if (!tensor_.defined()) return tensor_;
  const bool same = (!tensor_.has_storage() || data_ == tensor_.storage().data()) &&
                    (!version_ || *version_ == tensor_._version());
  TORCH_CHECK(same, "the ", what, " of a layer, of shape ", tensor_.sizes(),
              ", was changed after the layer was called and before its output was used, in a way "
              "that torch does not see; convert the model with fuse=False");
  return tensor_;
}

bool Read::shares_memory_with(const at::Tensor& other) const {
  return tensor_.defined() && tensor_.has_storage() && other.has_storage() &&
         tensor_.storage().is_alias_of(other.storage());
}

namespace {

// Steps of a chain that run one by one add a few gradient functions each.
constexpr uint64_t kNodesOfAStep = 8;

uint64_t depth_of(const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.requires_grad()) return 0;
  const auto& node = tensor.grad_fn();
  return node == nullptr ? 0 : node->topological_nr();
}

}  // namespace

uint64_t depth_behind(std::initializer_list<at::Tensor> tensors) {
  uint64_t depth = 0;
  for (const auto& tensor : tensors) depth = std::max(depth, depth_of(tensor));
  return depth + kNodesOfAStep;
}

Call::~Call() {
  if (!layer && !plan) return;
  py::gil_scoped_acquire gil;
  layer = py::object();
  plan = py::object();
}

Chain::Chain(std::shared_ptr<const Call> call, Kind layer, std::vector<int64_t> sizes,
             at::MemoryFormat format, bool requires_grad, uint64_t depth)
    : session_(call->session),
      call_(std::move(call)),
      step_{layer},
      kinds_(1 << static_cast<int>(layer)),
      sizes_(std::move(sizes)),
      format_(format),
      requires_grad_(requires_grad),
      depth_(depth) {}

std::shared_ptr<Chain> Chain::extended(Step step, std::vector<int64_t> sizes,
                                       at::MemoryFormat format) {
  const auto wants_grad = [](const Read& read) {
    return read.defined() && read.unchecked().requires_grad();
  };
  bool requires_grad = requires_grad_;
  if (at::GradMode::is_enabled()) {
    requires_grad |= step.kind == Kind::ADD && wants_grad(step.tensor);
    if (step.norm) {
      requires_grad |=
          wants_grad(step.norm->bias) || (!step.norm->constant && wants_grad(step.norm->weight));
    }
  }
  const uint64_t depth = std::max(depth_, depth_of(step.tensor.unchecked())) + kNodesOfAStep;
  auto next =
      std::make_shared<Chain>(call_, step.kind, std::move(sizes), format, requires_grad, depth);
  next->kinds_ |= kinds_;
  next->act_ = step.kind == Kind::ACT ? step.act : act_;
  next->step_ = std::move(step);
  next->parent_ = shared_from_this();
  children_.push_back(next);
  return next;
}

bool Chain::has_live_children() const {
  return std::any_of(children_.begin(), children_.end(), [](const auto& child) {
    const auto held = child.lock();
    return held != nullptr && !held->has_run();
  });
}

bool Chain::needed_besides(const Chain* child) const {
  return tensor != nullptr || anchor != nullptr ||
         std::any_of(children_.begin(), children_.end(), [&](const auto& other) {
           const auto held = other.lock();
           return held != nullptr && held.get() != child && !held->has_run();
         });
}

const Norm* Chain::update() const {
  const Norm* norm = step_.norm.get();
  return norm != nullptr && norm->updates() && !norm->done ? norm : nullptr;
}

bool Chain::writes(const at::Tensor& tensor) const {
  for (const Chain* chain = this; chain != nullptr; chain = chain->parent_.get()) {
    if (chain->has_run()) return false;
    if (const Norm* norm = chain->update()) {
      return norm->running_mean.shares_memory_with(tensor) ||
             norm->running_var.shares_memory_with(tensor);
    }
  }
  return false;
}

bool Chain::reads(const at::Tensor& tensor) const {
  const auto shares = [&](const Read& read) { return read.shares_memory_with(tensor); };
  for (const Chain* chain = this; chain != nullptr; chain = chain->parent_.get()) {
    if (chain->has_run())
      return chain->value_.defined() && Read(chain->value_).shares_memory_with(tensor);
    const Step& step = chain->step_;
    if (shares(step.tensor)) return true;
    if (const Norm* norm = step.norm.get()) {
      if (shares(norm->weight) || shares(norm->bias) || shares(norm->running_mean) ||
          shares(norm->running_var))
        return true;
    }
  }
  return shares(call_->input) || shares(call_->weight) || shares(call_->bias);
}

void Chain::run_children() {
  const auto children = std::move(children_);
  children_.clear();
  for (const auto& weak : children) {
    if (const auto child = weak.lock()) {
      if (child->has_run() || child->tensor != nullptr || child->anchor != nullptr) child->run();
      child->run_children();
    }
  }
}

namespace {

py::object optional(const Read& read, const char* what) {
  return read.defined() ? py::cast(read.get(what)) : py::none();
}

}  // namespace

Chain::Arguments Chain::arguments(const std::vector<const Chain*>& steps) {
  Arguments all{py::none(), py::none(), py::none(), py::none(), {}, 0};
  for (const Chain* chain : steps) {
    const Step& step = chain->step_;
    if (step.kind == Kind::NORM) {
      const Norm& n = *step.norm;
      n.done = true;
      all.norm =
          py::make_tuple(optional(n.weight, "norm's weight"), optional(n.bias, "norm's bias"),
                         n.running_mean.unchecked(), n.running_var.unchecked(),
                         n.batches.unchecked(), n.constant, n.batch, n.momentum, n.eps);
    }
    if (step.kind == Kind::ADD) all.residual = optional(step.tensor, "other summand");
    if (step.kind == Kind::DROPOUT) {
      all.noise = optional(step.tensor, "noise");
      all.p = step.p;
    }
    if (step.kind == Kind::ACT) all.act = step.act;
    if (step.kind == Kind::POOL) {
      const Pool& pool = step.pool;
      all.pool = py::make_tuple(pool.kernel, pool.stride, pool.padding, pool.ceil);
    }
  }
  return all;
}

at::Tensor Chain::fused(const std::vector<const Chain*>& steps) const {
  const Call& call = *call_;
  const Arguments all = arguments(steps);
  const py::object output = session_->engine().attr("run")(
      call.layer, call.plan, call.input.get("input"), call.weight.get("weight"),
      optional(call.bias, "bias"), call.weight_trains, all.norm, all.residual, all.act.kind,
      all.act.slope, all.pool, all.noise, all.p);
  return output.cast<at::Tensor>();
}

at::Tensor Chain::resumed(const std::vector<const Chain*>& steps, at::Tensor value) const {
  const Arguments all = arguments(steps);
  const py::object output = session_->engine().attr("resume")(
      value, all.norm, all.residual, all.act.kind, all.act.slope, all.pool);
  if (!output.is_none()) return output.cast<at::Tensor>();
  for (const Chain* chain : steps) value = stock(value, chain->step_);
  return value;
}

void Chain::compute() {
  std::vector<const Chain*> steps;
  std::shared_ptr<Chain> from;
  for (Chain* chain = this;; chain = chain->parent_.get()) {
    steps.push_back(chain);
    from = chain->parent_;
    if (from == nullptr || from->has_run() || from->needed_besides(chain)) break;
  }
  std::reverse(steps.begin(), steps.end());
  if (from == nullptr) {
    value_ = fused(steps);
  } else {
    value_ = resumed(steps, from->tensor == nullptr ? from->run() : from->tensor->value());
  }
  parent_ = nullptr;
  call_ = nullptr;
  step_ = Step{step_.kind};
}

const at::Tensor& Chain::run() {
  if (value_.defined()) return value_;
  InSession scope(*session_);
  compute();
  if (anchor != nullptr) connect(std::exchange(anchor, nullptr));
  return value_;
}

void Chain::connect(const NodePtr& node) {
  if (connected_ || node == nullptr) return;
  static_cast<Anchor*>(node.get())->stand_for(torch::autograd::impl::gradient_edge(value_));
  at::Tensor behind = value_.detach();
  torch::autograd::impl::set_gradient_edge(behind, {node, 0});
  value_ = std::move(behind);
  connected_ = true;
}

}  // namespace wus::deferral
