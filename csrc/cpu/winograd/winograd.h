// 3x3 convolution, unit stride and dilation, one group, by Winograd's minimal filtering with
// weights transformed beforehand. float32; maps channels_last. Schemas, shapes and layouts: see
// ops.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace wus::cpu {

at::Tensor winograd_pack(const at::Tensor& weight, bool dgrad, int64_t scheme);
at::Tensor& winograd_pack_(at::Tensor& packed, const at::Tensor& weight, bool dgrad,
                           int64_t scheme);

std::tuple<at::Tensor, at::Tensor> winograd_forward(const at::Tensor& input,
                                                    const at::Tensor& packed,
                                                    const std::optional<at::Tensor>& bias,
                                                    int64_t out_channels, int64_t padding,
                                                    int64_t scheme, int64_t epilogue);

std::tuple<at::Tensor, at::Tensor> winograd_dgrad(const at::Tensor& grad_output,
                                                  const at::Tensor& packed,
                                                  const std::optional<at::Tensor>& mask,
                                                  int64_t in_channels, at::IntArrayRef input_size,
                                                  int64_t padding, int64_t scheme, int64_t prologue,
                                                  const std::optional<at::Tensor>& z,
                                                  const std::optional<at::Tensor>& batch_norm);

at::Tensor winograd_wgrad(const at::Tensor& grad_output, const at::Tensor& input,
                          const std::optional<at::Tensor>& mask, int64_t padding, int64_t scheme,
                          int64_t prologue, const std::optional<at::Tensor>& z,
                          const std::optional<at::Tensor>& batch_norm, bool channels_last);

}  // namespace wus::cpu
