// Tensors seen as rows x channels: [N, C, H, W] in channels_last has N * H * W rows of C channels,
// any other tensor has rows of its last dimension.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "common/layout.h"

namespace wus {

struct Rows {
  int64_t rows, channels;

  explicit Rows(const at::Tensor& t) {
    channels = t.dim() == 4 ? t.size(1) : t.dim() == 0 ? 1 : t.size(-1);
    rows = channels ? t.numel() / channels : 0;
  }
  int64_t mask_bytes() const { return wus::mask_bytes(channels); }
};

inline at::MemoryFormat row_format(const at::Tensor& t) {
  return t.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

inline at::Tensor empty_rows(const at::Tensor& like) {
  return at::empty(like.sizes(), like.options().memory_format(row_format(like)));
}

inline at::Tensor empty_mask(const at::Tensor& input) {
  const Rows shape(input);
  return at::empty({shape.rows, shape.mask_bytes()}, input.options().dtype(at::kByte));
}

inline void check_same_size(const at::Tensor& t, const char* name, const at::Tensor& other,
                            const char* other_name) {
  TORCH_CHECK_VALUE(t.sizes() == other.sizes(), name, " has size ", t.sizes(), ", but ", other_name,
                    " has size ", other.sizes());
}

inline void check_dense(const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.is_contiguous(row_format(t)), name,
                    " must be dense, in channels_last format if it is 4-D, to be changed in "
                    "place; got size ",
                    t.sizes(), " with strides ", t.strides());
}

inline void check_bytes(const at::Tensor& t, const char* name, at::IntArrayRef size,
                        const at::Device& device = at::kCPU) {
  TORCH_CHECK_VALUE(t.device() == device && t.scalar_type() == at::kByte && t.sizes() == size &&
                        t.is_contiguous(),
                    name, " must be a contiguous uint8 tensor of size ", size, " on ", device,
                    ", got ", t.scalar_type(), " of size ", t.sizes(), " on ", t.device());
}

inline void check_mask(const at::Tensor& mask, const at::Tensor& of) {
  const Rows shape(of);
  check_bytes(mask, "mask", {shape.rows, shape.mask_bytes()}, of.device());
}

inline void check_pool(at::IntArrayRef pool) {
  TORCH_CHECK_VALUE(pool.equals({2, 2, 0, 0}), "pool must be [2, 2, 0, 0] on a GPU, got ", pool);
}

inline void check_poolable(const at::Tensor& input) {
  TORCH_CHECK_VALUE(input.dim() == 4 && input.size(2) >= 2 && input.size(3) >= 2,
                    "input must be [N, C, H, W] with H and W at least 2, got size ", input.sizes());
}

inline void check_pooled(const at::Tensor& grad_output, at::IntArrayRef input_size) {
  const int64_t height = input_size[0], width = input_size[1];
  TORCH_CHECK_VALUE(height >= 2 && width >= 2 && grad_output.dim() == 4 &&
                        grad_output.size(2) == height / 2 && grad_output.size(3) == width / 2,
                    "grad_output must be [N, C, H / 2, W / 2] for input_size [H, W] = ", input_size,
                    ", got size ", grad_output.sizes());
}

}  // namespace wus
