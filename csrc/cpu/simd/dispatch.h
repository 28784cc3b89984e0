// Which instruction set's kernels run: decided once, as torch decides for its own kernels, so that
// ATEN_CPU_CAPABILITY (default, avx2, avx512) chooses for both.
#pragma once

namespace wus::cpu {

enum class Isa { generic, avx2, avx512 };

Isa isa();
const char* isa_name();

// The table made for the instruction set in use, of the three that wus::cpu::<isa> define.
#if defined(__x86_64__)
#define WUS_DISPATCH(table)                                                 \
  (::wus::cpu::isa() == ::wus::cpu::Isa::avx512 ? ::wus::cpu::avx512::table \
   : ::wus::cpu::isa() == ::wus::cpu::Isa::avx2 ? ::wus::cpu::avx2::table   \
                                                : ::wus::cpu::generic::table)
#define WUS_DECLARE_TABLE(type, table) \
  namespace avx512 {                   \
  extern const type table;             \
  }                                    \
  namespace avx2 {                     \
  extern const type table;             \
  }                                    \
  namespace generic {                  \
  extern const type table;             \
  }
#else
#define WUS_DISPATCH(table) (::wus::cpu::generic::table)
#define WUS_DECLARE_TABLE(type, table) \
  namespace generic {                  \
  extern const type table;             \
  }
#endif

}  // namespace wus::cpu
