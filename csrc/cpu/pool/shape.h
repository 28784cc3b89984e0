// A max-pool's windows over a map.
#pragma once

#include "common/layout.h"

namespace wus::cpu {

// Windows of kernel x kernel pixels, `stride` apart, the first `padding` outside the map. All hold
// a pixel; 2 <= kernel <= 15, so that a position in a window takes a byte.
struct PoolShape {
  int64_t kernel, stride, padding;
  int64_t height, width;  // of the input
  int64_t oh, ow;         // of the output

  // The code of a window through which no gradient passes.
  WUS_LAYOUT_INLINE int blocked() const { return static_cast<int>(kernel * kernel); }
};

}  // namespace wus::cpu
