#include <ATen/core/Tensor.h>
#include <torch/library.h>

namespace wus::cpu {
namespace {

int64_t storage_users(const at::Tensor& tensor) {
  return static_cast<int64_t>(tensor.storage().use_count());
}

}  // namespace

TORCH_LIBRARY_IMPL(wus, CPU, m) { m.impl("storage_users", storage_users); }

}  // namespace wus::cpu
