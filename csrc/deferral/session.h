#pragma once
// One forward pass of a converted model, in which layers defer.
#include <ATen/ThreadLocalState.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "deferral/chain.h"

namespace wus::deferral {

// What surrounds a call and decides what it means: gradient mode, autocast, transforms, modes,
// hooks of saved tensors.
struct Surroundings {
  static Surroundings now();
  bool operator==(const Surroundings&) const = default;

  uint64_t included, excluded;
  bool grad;
  int64_t function_modes, dispatch_modes;
  const void *pack_hook, *unpack_hook;
};

class Session : public std::enable_shared_from_this<Session> {
 public:
  // engine: runs chains (`run`, `resume`) and dropout (`drop`), and keeps cast weights (`cast`).
  // observed: it is told of every chain (`observe`).
  Session(pybind11::object engine, bool observed)
      : engine_(std::move(engine)), observed_(observed) {}
  ~Session();

  // The one of this thread, or null.
  static Session* current();

  // False where this thread has one already.
  bool begin();
  // Settles what is still referred to: outputs, and what the model has kept.
  void finish();
  // The same in between, before something is done to the model that torch does not see.
  void settle_all();
  // After an exception: what is left settles when it is touched.
  void abandon();

  bool undisturbed() const { return Surroundings::now() == surroundings_; }
  void add(const std::shared_ptr<Chain>& chain);
  // A tensor is about to be read, or written: runs what was called earlier and would write it, or
  // read what it holds now.
  void before_use(const at::Tensor& tensor, bool written);
  // Runs at the end, whether or not anybody holds the chain's tensor.
  void keep(const std::shared_ptr<Chain>& chain);

  const pybind11::object& engine() const { return engine_; }
  bool observed() const { return observed_; }
  std::recursive_mutex mutex;

 private:
  friend class InSession;
  void leave();

  pybind11::object engine_;
  bool observed_;
  Surroundings surroundings_{};
  std::optional<at::ThreadLocalState> state_;
  std::vector<std::weak_ptr<Chain>> pending_;
  std::vector<std::shared_ptr<Chain>> kept_;
};

// Waits for a session's mutex without holding the interpreter's lock.
std::unique_lock<std::recursive_mutex> locked(std::recursive_mutex& mutex);

// For a scope: the surroundings of the session's beginning, its mutex and the interpreter's lock.
class InSession {
 public:
  explicit InSession(Session& session);
  ~InSession();

 private:
  std::unique_lock<std::recursive_mutex> lock_;
  std::optional<pybind11::gil_scoped_acquire> gil_;
  std::optional<at::ThreadLocalStateGuard> state_;
  std::optional<c10::impl::ExcludeDispatchKeyGuard> excluded_;
};

}  // namespace wus::deferral
