// A max-pool as operators are handed it: [kernel, stride, padding, ceil].
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/pool/shape.h"

namespace wus::cpu {

// Of the pool over an input of this height and width.
PoolShape pool_shape(at::IntArrayRef pool, at::IntArrayRef input_size);

}  // namespace wus::cpu
