#include "deferral/session.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SavedTensorHooks.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/PyInterpreter.h>

#include <algorithm>
#include <utility>

#include "deferral/deferred.h"

namespace wus::deferral {
namespace py = pybind11;
namespace {

thread_local Session* current_session = nullptr;

// Leaves however the scope is left.
template <typename Leave>
struct Finally {
  Leave leave;
  ~Finally() { leave(); }
};

}  // namespace

Surroundings Surroundings::now() {
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  const auto& hooks = at::SavedTensorDefaultHooks::get_tls_state().stack;
  const bool none = hooks.empty();
  return {keys.included_.raw_repr(),
          keys.excluded_.raw_repr(),
          c10::GradMode::is_enabled(),
          at::impl::PythonTorchFunctionTLS::stack_len(),
          c10::impl::TorchDispatchModeTLS::stack_len(),
          none ? nullptr : hooks.top().first.ptr(getPyInterpreter()),
          none ? nullptr : hooks.top().second.ptr(getPyInterpreter())};
}

std::unique_lock<std::recursive_mutex> locked(std::recursive_mutex& mutex) {
  std::unique_lock<std::recursive_mutex> lock(mutex, std::try_to_lock);
  if (lock.owns_lock()) return lock;
  if (PyGILState_Check()) {  // whoever has the mutex may need the interpreter
    py::gil_scoped_release release;
    lock.lock();
  } else {
    lock.lock();
  }
  return lock;
}

InSession::InSession(Session& session) : lock_(locked(session.mutex)), gil_(std::in_place) {
  if (session.undisturbed()) {
    excluded_.emplace(kKey);
  } else {
    state_.emplace(*session.state_);
  }
}

InSession::~InSession() = default;

Session::~Session() {
  if (current_session == this) leave();
  if (!engine_) return;
  if (!Py_IsInitialized()) {  // a tensor that outlives the interpreter
    engine_.release();
    return;
  }
  py::gil_scoped_acquire gil;
  engine_ = py::object();
}

Session* Session::current() { return current_session; }

bool Session::begin() {
  if (current_session != nullptr) return false;
  state_.emplace();
  c10::impl::tls_set_dispatch_key_included(kKey, true);
  surroundings_ = Surroundings::now();
  current_session = this;
  return true;
}

void Session::leave() {
  c10::impl::tls_set_dispatch_key_included(kKey, false);
  current_session = nullptr;
  kept_.clear();
  pending_.clear();
}

void Session::add(const std::shared_ptr<Chain>& chain) {
  std::erase_if(pending_, [](const auto& weak) {
    const auto held = weak.lock();
    return held == nullptr || (held->has_run() && held->tensor == nullptr);
  });
  std::erase_if(kept_, [](const auto& held) { return held->has_run() || !held->is_owed(); });
  pending_.push_back(chain);
  if (chain->update() != nullptr) kept_.push_back(chain);
}

void Session::keep(const std::shared_ptr<Chain>& chain) { kept_.push_back(chain); }

void Session::before_use(const at::Tensor& tensor, bool written) {
  const auto lock = locked(mutex);
  const auto run = [&](const std::shared_ptr<Chain>& chain) {
    if (chain == nullptr || chain->has_run()) return;
    if (chain->writes(tensor) || (written && chain->reads(tensor))) chain->run();
  };
  for (size_t i = 0; i < pending_.size(); ++i) {
    const auto chain = pending_[i].lock();
    if (chain != nullptr && chain->tensor != nullptr) run(chain);
  }
  for (size_t i = 0; i < kept_.size(); ++i) {
    if (kept_[i]->is_owed()) run(std::shared_ptr<Chain>(kept_[i]));
  }
}

void Session::finish() {
  const auto lock = locked(mutex);
  const Finally left{[this] { leave(); }};
  settle_all();
}

void Session::settle_all() {
  const auto lock = locked(mutex);
  for (size_t i = 0; i < pending_.size(); ++i) {
    const auto chain = pending_[i].lock();
    if (chain == nullptr || chain->tensor == nullptr) continue;
    // Null where the last who held it lets go of it just now.
    const auto held = c10::intrusive_ptr<c10::TensorImpl>::reclaim(
        static_cast<c10::TensorImpl*>(c10::raw::weak_intrusive_ptr::lock(chain->tensor)));
    if (held != nullptr) static_cast<Deferred*>(held.get())->settle();
  }
  for (size_t i = 0; i < kept_.size(); ++i) {
    if (kept_[i]->is_owed()) kept_[i]->run();
  }
}

void Session::abandon() {
  const auto lock = locked(mutex);
  const Finally left{[this] { leave(); }};
  // Running statistics are updated by then in stock PyTorch.
  for (size_t i = 0; i < kept_.size(); ++i) {
    if (kept_[i]->update() != nullptr) kept_[i]->run();
  }
}

}  // namespace wus::deferral
