#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "cuda/elementwise/mask_kernels.h"
#include "cuda/elementwise/pool_kernels.h"
#include "cuda/launch.h"

namespace wus::cuda {
namespace {

std::tuple<at::Tensor, at::Tensor> relu_max_pool(const at::Tensor& input, bool relu,
                                                 at::IntArrayRef pool) {
  check_float(input, "input");
  check_pool(pool);
  check_poolable(input);
  const c10::cuda::CUDAGuard guard(input.device());
  const at::Tensor x = as_rows(input, "input");
  const int64_t batch = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  at::Tensor output = at::empty({batch, channels, height / 2, width / 2},
                                x.options().memory_format(at::MemoryFormat::ChannelsLast));
  at::Tensor code =
      at::empty({batch, height / 2, width / 2, channels}, x.options().dtype(at::kByte));
  if (output.numel() == 0) return {output, code};
  const auto stream = c10::cuda::getCurrentCUDAStream();
  WUS_DISPATCH_DTYPE(x.scalar_type(), "relu_max_pool", [&] {
    cuda::relu_max_pool(x.const_data_ptr<scalar_t>(), Affine{}, height, width, relu,
                        output.data_ptr<scalar_t>(), code.data_ptr<uint8_t>(), Rows(output).rows,
                        channels, stream);
  });
  return {output, code};
}

std::tuple<at::Tensor, at::Tensor> max_pool_bias_grad(const at::Tensor& grad_output,
                                                      const at::Tensor& code,
                                                      at::IntArrayRef input_size,
                                                      bool need_grad_input, at::IntArrayRef pool) {
  check_float(grad_output, "grad_output");
  check_pool(pool);
  check_pooled(grad_output, input_size);
  const int64_t batch = grad_output.size(0), channels = grad_output.size(1);
  const int64_t height = input_size[0], width = input_size[1];
  check_bytes(code, "code", {batch, height / 2, width / 2, channels}, grad_output.device());
  const c10::cuda::CUDAGuard guard(grad_output.device());
  const at::Tensor grad = as_rows(grad_output, "grad_output");
  at::Tensor grad_input =
      need_grad_input ? at::empty({batch, channels, height, width},
                                  grad.options().memory_format(at::MemoryFormat::ChannelsLast))
                      : nothing(grad);
  const auto floats = grad.options().dtype(at::kFloat);
  if (grad.numel() == 0) return {grad_input, at::zeros({channels}, floats)};
  const int64_t rows = Rows(grad).rows;
  at::Tensor grad_bias = at::empty({channels}, floats);
  at::Tensor partial = at::empty({partial_sums(rows, channels)}, floats);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  WUS_DISPATCH_DTYPE(grad.scalar_type(), "max_pool_bias_grad", [&] {
    cuda::max_pool_bias_grad(
        grad.const_data_ptr<scalar_t>(), code.const_data_ptr<uint8_t>(), height, width,
        need_grad_input ? grad_input.data_ptr<scalar_t>() : nullptr, partial.data_ptr<float>(),
        grad_bias.data_ptr<float>(), rows, channels, stream);
  });
  return {grad_input, grad_bias};
}

TORCH_LIBRARY_IMPL(wus, CUDA, m) {
  m.impl("relu_max_pool", &relu_max_pool);
  m.impl("max_pool_bias_grad", &max_pool_bias_grad);
}

}  // namespace
}  // namespace wus::cuda
