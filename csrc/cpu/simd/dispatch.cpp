#include "cpu/simd/dispatch.h"

#include <ATen/Version.h>

#include <string>

namespace wus::cpu {

Isa isa() {
  static const Isa chosen = [] {
#if defined(__x86_64__)
    const std::string capability = at::get_cpu_capability();
    // torch's AVX512 level implies F, BW, DQ, VL and FMA; its AVX2 level implies FMA.
    if (capability.rfind("AVX512", 0) == 0) return Isa::avx512;
    if (capability == "AVX2") return Isa::avx2;
#endif
    return Isa::generic;
  }();
  return chosen;
}

const char* isa_name() {
  switch (isa()) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "generic";
  }
}

}  // namespace wus::cpu
