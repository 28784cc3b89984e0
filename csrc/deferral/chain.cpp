#include "deferral/chain.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <initializer_list>
#include <utility>

#include "chains/functions.h"
#include "chains/library.h"
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
  if (!Py_IsInitialized()) {  // a tensor that outlives the interpreter
    layer.release();
    plan.release();
    return;
  }
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

Chain::Arguments Chain::arguments(const std::vector<const Chain*>& steps) {
  Arguments all;
  for (const Chain* chain : steps) {
    const Step& step = chain->step_;
    if (step.kind == Kind::NORM) {
      all.norm = step.norm.get();
      all.norm->done = true;
    }
    if (step.kind == Kind::ADD) all.residual = step.tensor.get("other summand");
    if (step.kind == Kind::DROPOUT) {
      all.noise = step.tensor.get("noise");
      all.p = step.p;
    }
    if (step.kind == Kind::ACT) all.act = step.act;
    if (step.kind == Kind::POOL) all.pool = &step.pool;
  }
  return all;
}

namespace {

// As the engine takes them.

py::object python(const at::Tensor& tensor) { return py::cast(tensor); }

py::object python(const Norm* norm) {
  if (norm == nullptr) return py::none();
  const Norm& n = *norm;
  return py::make_tuple(n.weight.get("norm's weight"), n.bias.get("norm's bias"),
                        n.running_mean.unchecked(), n.running_var.unchecked(),
                        n.batches.unchecked(), n.constant, n.batch, n.momentum, n.eps);
}

py::object python(const Pool* pool) {
  if (pool == nullptr) return py::none();
  return py::make_tuple(pool->kernel, pool->stride, pool->padding, pool->ceil);
}

// As chains take them.

std::optional<chains::BatchNorm> batch_norm(const Norm* norm) {
  if (norm == nullptr) return std::nullopt;
  const Norm& n = *norm;
  const at::Tensor& weight = n.weight.get("norm's weight");
  return chains::BatchNorm{n.constant && weight.defined() ? weight.detach() : weight,
                           n.bias.get("norm's bias"),
                           n.running_mean.unchecked(),
                           n.running_var.unchecked(),
                           n.momentum,
                           n.eps};
}

chains::Act following(const Act& act, const Pool* pool) {
  chains::Act made{act.kind, act.slope};
  if (pool != nullptr) made.pool = {pool->kernel, pool->stride, pool->padding, pool->ceil};
  return made;
}

}  // namespace

at::Tensor Chain::fused(const std::vector<const Chain*>& steps) const {
  const Call& call = *call_;
  const Arguments all = arguments(steps);
  const py::object& engine = session_->engine();
  if (session_->observed()) {
    engine.attr("observe")(call.layer, call.plan, all.norm != nullptr, all.residual.defined(),
                           all.act.kind, all.pool != nullptr, all.noise.defined());
  }
  if (call.is_given()) return resumed({steps.begin() + 1, steps.end()}, call.input.get("input"));
  if ((all.norm == nullptr || all.norm->batch) && !all.noise.defined()) {
    const py::object library = call.plan.attr("library");
    if (!library.is_none()) return by_library(library.cast<chains::LibraryPtr>(), all);
  }
  const py::object output = engine.attr("run")(
      call.layer, call.plan, call.input.get("input"), call.weight.get("weight"),
      call.bias.get("bias"), call.weight_trains, python(all.norm), python(all.residual),
      all.act.kind, all.act.slope, python(all.pool), python(all.noise), all.p);
  return output.cast<at::Tensor>();
}

at::Tensor Chain::by_library(const chains::LibraryPtr& library, const Arguments& all) const {
  const Call& call = *call_;
  const at::Tensor& own = call.weight.get("weight");
  const chains::Act act = following(all.act, all.pool);
  const bool alone = all.norm == nullptr && !all.residual.defined() && act.none();
  at::Tensor weight = own.detach();
  const bool cast = !library->takes(own, call.dtype);
  if (cast && !call.weight_trains) {  // a copy is kept for a skip window
    const auto& engine = session_->engine();
    weight = engine.attr("cast")(call.layer, own, library, call.dtype).cast<at::Tensor>();
  }
  py::gil_scoped_release no_gil;
  at::Tensor input = call.input.get("input").to(call.dtype);
  if (has(Kind::CONV))
    input = chains::entered(input, own.suggest_memory_format() == at::MemoryFormat::ChannelsLast);
  const at::Tensor trained = call.weight_trains ? own : at::Tensor();
  const at::Tensor& bias = call.bias.get("bias");
  if (alone) return library->alone(input, weight, bias, trained);
  if (cast && call.weight_trains) weight = library->cast(weight, call.dtype);
  const at::Tensor residual =
      all.residual.defined() ? chains::entered(all.residual, false) : all.residual;
  return chains::chained(library->on(std::move(weight)), input, bias, trained, batch_norm(all.norm),
                         residual, act);
}

at::Tensor Chain::resumed(const std::vector<const Chain*>& steps, at::Tensor value) const {
  const Arguments all = arguments(steps);
  const py::object output = session_->engine().attr("resume")(
      value, python(all.norm), python(all.residual), all.act.kind, all.act.slope, python(all.pool));
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
