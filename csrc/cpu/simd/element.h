// The types of the elements that kernels read and write; all compute in float.
#pragma once

#include <stdint.h>

namespace wus::cpu {

// A float without its lower 16 bits, as at::BFloat16 is.
struct Bf16 {
  uint16_t bits;
};

}  // namespace wus::cpu
