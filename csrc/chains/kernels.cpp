#include "chains/kernels.h"

#include <map>
#include <memory>
#include <mutex>

namespace wus::chains {
namespace {

// Converts itself to whichever operator it is to be.
struct Named {
  std::string name;

  template <class F>
  operator c10::TypedOperatorHandle<F>() const {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "").typed<F>();
  }
};

}  // namespace

Kernels::Kernels(const std::string& space)
    : activate(Named{space + "::activate"}),
      activate_(Named{space + "::activate_"}),
      activate_grad(Named{space + "::activate_grad"}),
      relu_max_pool(Named{space + "::relu_max_pool"}),
      max_pool_bias_grad(Named{space + "::max_pool_bias_grad"}),
      train(Named{space + "::batch_norm_train"}),
      scale_shift(Named{space + "::batch_norm_scale_shift"}),
      update_running(Named{space + "::batch_norm_update_running"}),
      apply(Named{space + "::batch_norm_apply"}),
      grad_coefficients(Named{space + "::batch_norm_grad_coefficients"}),
      grad_input(Named{space + "::batch_norm_grad_input"}) {}

const Kernels& Kernels::of(const std::string& space) {
  static std::mutex mutex;
  static auto* known = new std::map<std::string, std::unique_ptr<Kernels>>;
  const std::lock_guard lock(mutex);
  auto& kernels = (*known)[space];
  if (kernels == nullptr) kernels = std::make_unique<Kernels>(space);
  return *kernels;
}

}  // namespace wus::chains
