// What every launcher does with its tensors before a kernel sees them.
#pragma once

#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "common/rows.h"

#define WUS_DISPATCH_DTYPE(dtype, name, ...)                                     \
  AT_DISPATCH_SWITCH(dtype, name,                                                \
                     AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) AT_DISPATCH_CASE( \
                         at::kHalf, __VA_ARGS__) AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__))

namespace wus::cuda {

inline void check_float(const at::Tensor& t, const char* name) {
  const at::ScalarType type = t.scalar_type();
  TORCH_CHECK_VALUE(
      t.is_cuda() && (type == at::kFloat || type == at::kHalf || type == at::kBFloat16), name,
      " must be a float32, float16 or bfloat16 tensor on a GPU, got ", type, " on ", t.device());
}

// The tensor dense in rows x channels: itself, or a copy.
inline at::Tensor as_rows(const at::Tensor& t, const char* name) {
  check_float(t, name);
  return t.contiguous(row_format(t));
}

inline at::Tensor nothing(const at::Tensor& like) { return at::empty({0}, like.options()); }

}  // namespace wus::cuda
