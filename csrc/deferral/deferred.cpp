#include "deferral/deferred.h"

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#include <atomic>
#include <memory>
#include <type_traits>
#include <utility>

#include "deferral/session.h"

namespace wus::deferral {
namespace {

// Gradient functions are shared pointers in torch up to 2.13.
template <typename Ptr = NodePtr>
Ptr make_anchor(uint64_t depth) {
  if constexpr (std::is_same_v<Ptr, std::shared_ptr<torch::autograd::Node>>) {
    return std::make_shared<Anchor>(depth);
  } else {
    return c10::make_intrusive<Anchor>(depth);
  }
}

c10::DispatchKeySet keys_like(const Chain& chain) {
  const auto device = chain.call().device.type();
  const auto backend = device == c10::kCUDA ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
  return c10::DispatchKeySet({backend, kKey});
}

// torch 2.10 added the type of the gradient.
template <typename Options>
void add_metadata(torch::autograd::Node& node, const Options& options, c10::SymIntArrayRef sizes) {
  if constexpr (requires { node.add_input_metadata(options, sizes, false, false, std::nullopt); }) {
    node.add_input_metadata(options, sizes, false, false, std::nullopt);
  } else {
    node.add_input_metadata(options, sizes, false, false);
  }
}

torch::autograd::AutogradMeta* meta_of(const c10::TensorImpl& impl) {
  return static_cast<torch::autograd::AutogradMeta*>(impl.autograd_meta());
}

}  // namespace

Deferred::Deferred(std::shared_ptr<Chain> chain)
    : TensorImpl(keys_like(*chain), c10::scalarTypeToTypeMeta(chain->dtype()),
                 chain->call().device),
      chain_(std::move(chain)) {
  set_sizes_contiguous(chain_->sizes());
  take_place();
  set_custom_sizes_strides(SizesStridesPolicy::CustomStrides);
  set_custom_layout(true);
  storage_access_should_throw_ = true;
}

void Deferred::take_place() {
  chain_->tensor = this;
  if (!chain_->requires_grad()) return;
  auto anchor = make_anchor(chain_->depth());
  const std::vector<c10::SymInt> sizes(chain_->sizes().begin(), chain_->sizes().end());
  add_metadata(*anchor, at::TensorOptions().dtype(dtype()).device(*device_opt_), sizes);
  set_autograd_meta(std::make_unique<torch::autograd::AutogradMeta>(
      nullptr, false, torch::autograd::Edge(std::move(anchor), 0)));
}

Deferred::~Deferred() { release_resources(); }

void Deferred::release_resources() {
  if (const auto chain = chain_) {  // which holds the mutex until it is free again
    const auto lock = locked(chain->session()->mutex);
    if (chain->tensor == this) {
      chain->tensor = nullptr;
      if (is_observed()) {
        chain->anchor = meta_of(*this)->grad_fn_;
        chain->session()->keep(chain);
      }
    }
    chain_ = nullptr;
  }
  TensorImpl::release_resources();
}

bool Deferred::is_observed() const {
  if (autograd_meta() == nullptr) return false;
  const auto* meta = meta_of(*this);
  return meta->grad_fn_.use_count() > 1 || !meta->hooks_.empty() || meta->retains_grad_ ||
         meta->cpp_hooks_list_ != nullptr;
}

void Deferred::become(std::shared_ptr<Chain> chain) {
  chain_->tensor = nullptr;
  std::atomic_store(&chain_, std::move(chain));
  take_place();
}

at::Tensor Deferred::value() {
  const auto chain = this->chain();
  if (chain == nullptr) return at::Tensor(c10::intrusive_ptr<TensorImpl>::reclaim_copy(this));
  const auto lock = locked(chain->session()->mutex);
  chain->run();
  // The tensor's hooks, also those to come, see the gradient of whoever takes the value, too.
  if (chain_ != nullptr && autograd_meta() != nullptr) chain->connect(meta_of(*this)->grad_fn_);
  return chain->run();
}

// Another thread may do the same at the same time.
void Deferred::settle() {
  const auto chain = this->chain();
  if (chain == nullptr) return;
  InSession scope(*chain->session());
  if (chain_ == nullptr) return;
  chain->run();
  if (chain_ == nullptr) return;
  if (is_observed()) chain->connect(meta_of(*this)->grad_fn_);
  const at::Tensor& value = chain->run();
  adopt(value.detach().contiguous(chain->format()), value);
  std::atomic_store(&chain_, std::shared_ptr<Chain>());
  chain->tensor = nullptr;
  chain->run_children();
}

void Deferred::adopt(const at::Tensor& data, const at::Tensor& value) {
  storage_access_should_throw_ = false;
  set_custom_layout(false);
  set_custom_sizes_strides(SizesStridesPolicy::Default);
  storage_ = data.storage();
  storage_offset_ = data.storage_offset();
  // Where sizes of one leave strides open: those that stock gives.
  empty_tensor_restride(chain_->format());
  if (!data.is_inference()) set_version_counter(data.unsafeGetTensorImpl()->version_counter());
  if (autograd_meta() != nullptr) {
    auto edge = torch::autograd::impl::gradient_edge(value);
    meta_of(*this)->grad_fn_ = std::move(edge.function);
    meta_of(*this)->output_nr_ = edge.input_nr;
  }
  // Last: whoever finds the keys of an ordinary tensor finds all of it.
  std::atomic_thread_fence(std::memory_order_release);
  key_set_ = data.key_set();
}

at::IntArrayRef Deferred::strides_custom() const {
  writable()->settle();
  return strides_default();
}

c10::SymIntArrayRef Deferred::sym_strides_custom() const {
  writable()->settle();
  return sym_strides_default();
}

c10::SymBool Deferred::sym_is_contiguous_custom(at::MemoryFormat format) const {
  writable()->settle();
  return is_contiguous(format);
}

at::Layout Deferred::layout_custom() const {
  writable()->settle();
  return at::kStrided;
}

c10::intrusive_ptr<c10::TensorImpl> Deferred::shallow_copy_and_detach(
    const c10::VariableVersion& version, bool allow_change) const {
  writable()->settle();
  return TensorImpl::shallow_copy_and_detach(version, allow_change);
}

c10::intrusive_ptr<c10::TensorImpl> Deferred::shallow_copy_and_detach(
    c10::VariableVersion&& version, bool allow_change) const {
  writable()->settle();
  return TensorImpl::shallow_copy_and_detach(std::move(version), allow_change);
}

const char* Deferred::tensorimpl_type_name() const {
  return is_settled() ? TensorImpl::tensorimpl_type_name() : "a tensor that is not computed yet";
}

Deferred* as_deferred(const at::Tensor& tensor) {
  if (!tensor.defined()) return nullptr;
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  return impl->key_set().has(kKey) ? static_cast<Deferred*>(impl) : nullptr;
}

bool is_plain(const at::Tensor& tensor) {
  constexpr auto odd = c10::DispatchKeySet(
      {c10::DispatchKey::Python, c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched,
       c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Functionalize,
       c10::DispatchKey::Conjugate, c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor});
  return tensor.layout() == at::kStrided && !tensor.is_nested() && !tensor.key_set().has_any(odd) &&
         !tensor._fw_grad(/*level=*/0).defined();
}

at::Tensor defer(std::shared_ptr<Chain> chain) {
  chain->session()->add(chain);
  return at::detail::make_tensor<Deferred>(std::move(chain));
}

}  // namespace wus::deferral
