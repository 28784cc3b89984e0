#include "cpu/scratch.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <memory>

namespace wus::cpu {

float* scratch(int64_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<float, Free> memory;
  static thread_local int64_t size = 0;
  if (size < floats) {
    size = 0;
    memory.reset();
    const int64_t rounded = (floats + 15) / 16 * 16;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, rounded * sizeof(float))));
    TORCH_CHECK(memory != nullptr, "wus: no memory for ", rounded, " floats of scratch");
    size = rounded;
  }
  return memory.get();
}

}  // namespace wus::cpu
