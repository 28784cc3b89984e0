#pragma once
// PyTorch's own operators for what a chain takes in.
#include <ATen/core/Tensor.h>

#include "deferral/chain.h"

namespace wus::deferral {

// A step, behind a value that has been computed.
at::Tensor stock(const at::Tensor& input, const Step& step);

}  // namespace wus::deferral
