// A convolution's data gradient, the mask of the ReLU below and its bias gradient, by cuDNN.
#include <ATen/cudnn/Handle.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <torch/library.h>

#include <tuple>

#include "cuda/elementwise/mask_kernels.h"
#include "cuda/epilogue/dgrad_graph.h"
#include "cuda/launch.h"

namespace wus::cuda {
namespace {

constexpr int kAlignment = 16;  // bytes, of every operand

DgradProblem problem_of(const at::Tensor& grad_output, const at::Tensor& weight,
                        at::IntArrayRef input_size, at::IntArrayRef padding,
                        at::IntArrayRef dilation, bool sum, bool tf32) {
  const auto type = grad_output.scalar_type();
  const auto kind = type == at::kHalf       ? DgradProblem::Type::kHalf
                    : type == at::kBFloat16 ? DgradProblem::Type::kBFloat16
                                            : DgradProblem::Type::kFloat;
  return {grad_output.get_device(),
          kind,
          tf32 && type == at::kFloat,
          sum,
          grad_output.size(0),
          weight.size(1),
          input_size[0],
          input_size[1],
          weight.size(0),
          grad_output.size(2),
          grad_output.size(3),
          {weight.size(2), weight.size(3)},
          {padding[0], padding[1]},
          {dilation[0], dilation[1]}};
}

void check(const at::Tensor& grad_output, const at::Tensor& weight, at::IntArrayRef input_size,
           at::IntArrayRef padding, at::IntArrayRef dilation) {
  check_float(grad_output, "grad_output");
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.scalar_type() == grad_output.scalar_type() &&
                        weight.device() == grad_output.device(),
                    "weight must be [K, C, R, S] of ", grad_output.scalar_type(), " on ",
                    grad_output.device(), ", got ", weight.scalar_type(), " of size ",
                    weight.sizes(), " on ", weight.device());
  bool fits = grad_output.dim() == 4 && grad_output.size(1) == weight.size(0);
  for (int i = 0; i < 2 && fits; ++i) {
    const auto reach = dilation[i] * (weight.size(i + 2) - 1);
    fits = grad_output.size(i + 2) == input_size[i] + 2 * padding[i] - reach;
  }
  TORCH_CHECK_VALUE(fits, "grad_output must be that of a convolution of stride 1 over ", input_size,
                    " with weight ", weight.sizes(), ", got size ", grad_output.sizes());
}

// The tensor in channels_last and aligned: itself, or a copy.
at::Tensor aligned(const at::Tensor& t) {
  const at::Tensor dense = t.contiguous(at::MemoryFormat::ChannelsLast);
  const auto address = reinterpret_cast<uintptr_t>(dense.const_data_ptr());
  return address % kAlignment ? dense.clone() : dense;
}

bool may_build() {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None;
}

bool conv_dgrad_relu_exists(const at::Tensor& grad_output, const at::Tensor& weight,
                            at::IntArrayRef input_size, at::IntArrayRef padding,
                            at::IntArrayRef dilation, bool sum, bool tf32) {
  check(grad_output, weight, input_size, padding, dilation);
  if (grad_output.numel() == 0) return false;
  const c10::cuda::CUDAGuard guard(grad_output.device());
  const auto problem = problem_of(grad_output, weight, input_size, padding, dilation, sum, tf32);
  return dgrad_graph(at::native::getCudnnHandle(), problem, may_build()) != nullptr;
}

std::tuple<at::Tensor, at::Tensor> conv_dgrad_relu(const at::Tensor& grad_output,
                                                   const at::Tensor& weight, const at::Tensor& mask,
                                                   at::IntArrayRef input_size,
                                                   at::IntArrayRef padding,
                                                   at::IntArrayRef dilation, bool sum, bool tf32) {
  check(grad_output, weight, input_size, padding, dilation);
  const c10::cuda::CUDAGuard guard(grad_output.device());
  const int64_t channels = weight.size(1);
  at::Tensor grad_input =
      at::empty({grad_output.size(0), channels, input_size[0], input_size[1]},
                grad_output.options().memory_format(at::MemoryFormat::ChannelsLast));
  check_mask(mask, grad_input);
  const auto handle = at::native::getCudnnHandle();
  const auto problem = problem_of(grad_output, weight, input_size, padding, dilation, sum, tf32);
  const auto graph = dgrad_graph(handle, problem, may_build());
  TORCH_CHECK(graph,
              "cuDNN has no engine for this data gradient, or it is not built yet while a "
              "CUDA graph is captured; ask conv_dgrad_relu_exists first");
  const Rows rows(grad_input);
  const auto bytes = grad_output.options().dtype(at::kByte);
  const at::Tensor passes = at::empty({rows.rows, channels}, bytes.dtype(at::kChar));
  unpack_mask(mask.const_data_ptr<uint8_t>(), passes.data_ptr<int8_t>(), rows.rows, channels,
              c10::cuda::getCurrentCUDAStream());
  at::Tensor grad_bias = at::zeros({sum ? channels : 0}, grad_output.options().dtype(at::kFloat));
  const at::Tensor workspace = at::empty({static_cast<int64_t>(graph->workspace())}, bytes);
  const at::Tensor grad = aligned(grad_output), kernel = aligned(weight);
  graph->run(handle,
             {grad.const_data_ptr(), kernel.const_data_ptr(), passes.const_data_ptr(),
              grad_input.mutable_data_ptr(), sum ? grad_bias.data_ptr<float>() : nullptr},
             workspace.mutable_data_ptr());
  return {grad_input, grad_bias};
}

TORCH_LIBRARY_IMPL(wus, CUDA, m) {
  m.impl("conv_dgrad_relu_exists", &conv_dgrad_relu_exists);
  m.impl("conv_dgrad_relu", &conv_dgrad_relu);
}

}  // namespace
}  // namespace wus::cuda
