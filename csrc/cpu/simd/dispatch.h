// Which instruction set's kernels run: decided once, as torch decides for its own kernels, so that
// ATEN_CPU_CAPABILITY (default, avx2, avx512) chooses for both.
#pragma once

namespace wus::cpu {

enum class Isa { generic, avx2, avx512 };

Isa isa();
const char* isa_name();

// The table made for the instruction set in use, of the three that wus::cpu::<isa> define; tables
// of kernels for elements of several types are declared with WUS_DECLARE_TABLES, and named with
// one.
#define WUS_DECLARE_TABLE(type, table) WUS_FOR_ISAS(extern const type table;)
#define WUS_DECLARE_TABLES(type, table) WUS_FOR_ISAS(template <class T> const type<T>& table();)

#if defined(__x86_64__)
#define WUS_DISPATCH(table)                                                 \
  (::wus::cpu::isa() == ::wus::cpu::Isa::avx512 ? ::wus::cpu::avx512::table \
   : ::wus::cpu::isa() == ::wus::cpu::Isa::avx2 ? ::wus::cpu::avx2::table   \
                                                : ::wus::cpu::generic::table)
#define WUS_FOR_ISAS(declaration) \
  namespace avx512 {              \
  declaration                     \
  }                               \
  namespace avx2 {                \
  declaration                     \
  }                               \
  namespace generic {             \
  declaration                     \
  }
#else
#define WUS_DISPATCH(table) (::wus::cpu::generic::table)
#define WUS_FOR_ISAS(declaration) \
  namespace generic {             \
  declaration                     \
  }
#endif

}  // namespace wus::cpu
