#pragma once
// A layer's call that has not been computed yet, and the steps that have been appended to it.
#include <ATen/core/Tensor.h>
#include <c10/core/MemoryFormat.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/variable.h>

#include <array>
#include <memory>
#include <optional>
#include <vector>

namespace wus::chains {
class Library;
using LibraryPtr = std::shared_ptr<Library>;
}  // namespace wus::chains

namespace wus::deferral {

class Chain;
class Session;
class Deferred;

// Shared or intrusive, as torch's version has it.
using NodePtr = decltype(torch::autograd::AutogradMeta::grad_fn_);

// A tensor that a step will read, as it was when the step was called. Writes through torch make the
// step run first; what escapes that is found out here.
class Read {
 public:
  Read() = default;
  explicit Read(at::Tensor tensor);

  // Throws if the tensor has changed meanwhile.
  const at::Tensor& get(const char* what) const;
  const at::Tensor& unchecked() const { return tensor_; }
  bool defined() const { return tensor_.defined(); }
  bool shares_memory_with(const at::Tensor& other) const;

 private:
  at::Tensor tensor_;
  const void* data_ = nullptr;
  std::optional<uint32_t> version_;
};

enum class Kind : uint8_t { CONV, LINEAR, NORM, ADD, ACT, POOL, DROPOUT };

// An activation, as common/activation.h numbers them.
struct Act {
  int kind = 0;
  double slope = 0;
};

// A square max-pool.
struct Pool {
  int64_t kernel, stride, padding;
  bool ceil;
};

// Batch norm as F.batch_norm was handed it. `batches`, if known, tells that the running statistics
// have changed, which their version counters do not.
struct Norm {
  Read weight, bias, running_mean, running_var, batches;
  bool constant;  // weight stands still
  bool batch;     // with the batch's statistics
  double momentum, eps;
  mutable bool done = false;

  // Whether running updates the running statistics.
  bool updates() const { return batch && running_mean.defined(); }
};

struct Step {
  Kind kind;
  Read tensor = {};                       // ADD: the other summand; DROPOUT: the noise
  double p = 0;                           // DROPOUT
  Act act = {};                           // ACT
  Pool pool = {};                         // POOL
  std::shared_ptr<const Norm> norm = {};  // NORM
};

// What the layer was called with; or a tensor that is there, which stands for a layer's output.
struct Call {
  std::shared_ptr<Session> session;
  pybind11::object layer, plan;
  Read input, weight, bias;
  bool weight_trains;
  at::ScalarType dtype;  // of the output
  at::Device device;

  bool is_given() const { return !weight.defined(); }

  ~Call();
};

class Chain : public std::enable_shared_from_this<Chain> {
 public:
  Chain(std::shared_ptr<const Call> call, Kind layer, std::vector<int64_t> sizes,
        at::MemoryFormat format, bool requires_grad, uint64_t depth);

  // This chain and one step more.
  std::shared_ptr<Chain> extended(Step step, std::vector<int64_t> sizes, at::MemoryFormat format);

  // The chain's value in the engine's own layout. Throws what the layers throw.
  const at::Tensor& run();
  // Whoever holds `anchor` finds this chain's value behind, and whoever is given the value passes
  // through it.
  void connect(const NodePtr& anchor);

  bool has(Kind kind) const { return kinds_ >> static_cast<int>(kind) & 1; }
  // Of the chain; the kind is 0 without an activation.
  const Act& act() const { return act_; }
  bool has_run() const { return value_.defined(); }
  bool has_live_children() const;
  // Whether anybody but `child` may still ask for this chain's value.
  bool needed_besides(const Chain* child) const;
  // Whether running would read, or write, this tensor's memory.
  bool reads(const at::Tensor& tensor) const;
  bool writes(const at::Tensor& tensor) const;
  // The running statistics that wait for this chain's own step, or null.
  const Norm* update() const;
  // Whether it must run even if nobody has its tensor.
  bool is_owed() const { return anchor != nullptr || update() != nullptr; }
  // Runs all that has been derived from this chain and has not run yet.
  void run_children();

  const Call& call() const { return *call_; }
  const std::shared_ptr<Session>& session() const { return session_; }
  const std::vector<int64_t>& sizes() const { return sizes_; }
  // Of the tensor that stock PyTorch would give.
  at::MemoryFormat format() const { return format_; }
  at::ScalarType dtype() const { return call_->dtype; }
  bool requires_grad() const { return requires_grad_; }
  // More than what any gradient function behind this chain's has (see torch's topological_nr).
  uint64_t depth() const { return depth_; }

  // The tensor that stands for this chain, not owned; null when there is none, or no more.
  Deferred* tensor = nullptr;
  // The place in the graph of a tensor that is gone, where somebody still refers to it.
  NodePtr anchor = nullptr;

 private:
  // What steps were called with.
  struct Arguments {
    const Norm* norm = nullptr;
    at::Tensor residual, noise;
    Act act;
    const Pool* pool = nullptr;
    double p = 0;
  };
  static Arguments arguments(const std::vector<const Chain*>& steps);

  void compute();
  // The steps, behind a value that was computed by itself or is there.
  at::Tensor resumed(const std::vector<const Chain*>& steps, at::Tensor value) const;
  at::Tensor fused(const std::vector<const Chain*>& steps) const;
  // The same where the engine has nothing to choose.
  at::Tensor by_library(const chains::LibraryPtr& library, const Arguments& all) const;

  std::shared_ptr<Session> session_;
  std::shared_ptr<const Call> call_;
  std::shared_ptr<Chain> parent_;
  std::vector<std::weak_ptr<Chain>> children_;
  Step step_;
  uint8_t kinds_;
  Act act_;
  std::vector<int64_t> sizes_;
  at::MemoryFormat format_;
  bool requires_grad_;
  uint64_t depth_;
  bool connected_ = false;
  at::Tensor value_;
};

// More than the depth of these tensors' gradient functions, and of a layer's on top.
uint64_t depth_behind(std::initializer_list<at::Tensor> tensors);

}  // namespace wus::deferral
