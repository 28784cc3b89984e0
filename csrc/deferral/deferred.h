#pragma once
// A tensor that has not been computed yet. It is computed, and is an ordinary tensor from then on,
// as soon as anything but a layer that a chain takes in touches it.
#include <ATen/core/Tensor.h>
#include <c10/core/TensorImpl.h>
#include <torch/csrc/autograd/function.h>

#include <memory>

#include "deferral/chain.h"

namespace wus::deferral {

// Above autograd, autocast, functorch and Python: what reaches an operator reaches us first.
constexpr auto kKey = c10::DispatchKey::TESTING_ONLY_GenericWrapper;

// The place of a tensor in the graph before it is computed.
struct Anchor : torch::autograd::Node {
  explicit Anchor(uint64_t depth) { topological_nr_ = depth; }

  // Not set_next_edges: others may refer to this place already, for which torch demands that its
  // depth be settled. It is, from the start.
  void stand_for(torch::autograd::Edge edge) { next_edges_ = {std::move(edge)}; }
  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override {
    return std::move(grads);
  }
  std::string name() const override { return "WusDeferredBackward"; }
};

class Deferred final : public c10::TensorImpl {
 public:
  explicit Deferred(std::shared_ptr<Chain> chain);
  ~Deferred() override;
  void release_resources() override;

  // Computes the tensor, in place: whoever holds it has an ordinary one.
  void settle();
  bool is_settled() const { return chain() == nullptr; }
  // Whether autograd or the user already holds this tensor's place in the graph.
  bool is_observed() const;
  // Null from when it is settled, which another thread may do at any time that the session's mutex
  // is free.
  std::shared_ptr<Chain> chain() const { return std::atomic_load(&chain_); }
  // Its value in the engine's own layout, for a layer that takes it.
  at::Tensor value();
  // The same tensor, one step further.
  void become(std::shared_ptr<Chain> chain);

  // What asks for more than sizes and type.
  at::IntArrayRef strides_custom() const override;
  c10::SymIntArrayRef sym_strides_custom() const override;
  c10::SymBool sym_is_contiguous_custom(at::MemoryFormat format) const override;
  at::Layout layout_custom() const override;
  c10::intrusive_ptr<TensorImpl> shallow_copy_and_detach(const c10::VariableVersion& version,
                                                         bool allow_change) const override;
  c10::intrusive_ptr<TensorImpl> shallow_copy_and_detach(c10::VariableVersion&& version,
                                                         bool allow_change) const override;
  const char* tensorimpl_type_name() const override;

 private:
  void take_place();
  void adopt(const at::Tensor& data, const at::Tensor& value);
  Deferred* writable() const { return const_cast<Deferred*>(this); }

  std::shared_ptr<Chain> chain_;
};

// The deferred tensor that this one is, or null where it is none (any more).
Deferred* as_deferred(const at::Tensor& tensor);
// Whether a tensor is one of numbers in memory and no more: no subclass, transform or tangent.
bool is_plain(const at::Tensor& tensor);
// A new one.
at::Tensor defer(std::shared_ptr<Chain> chain);

}  // namespace wus::deferral
