#include "cpu/pool/pool.h"

#include <torch/library.h>

#include <tuple>

#include "cpu/parallel_rows.h"
#include "cpu/pool/kernels.h"

namespace wus::cpu {

PoolShape pool_shape(at::IntArrayRef pool, at::IntArrayRef input_size) {
  TORCH_CHECK_VALUE(pool.size() == 4 && pool[0] >= 2 && pool[0] <= 15 && pool[1] >= 1 &&
                        pool[2] >= 0 && pool[2] <= pool[0] / 2,
                    "pool must be [kernel, stride, padding, ceil] with a kernel of 2 to 15, a "
                    "stride from 1 and a padding up to half the kernel, got ",
                    pool);
  const int64_t kernel = pool[0], stride = pool[1], padding = pool[2];
  const auto windows = [&](int64_t size) {
    const int64_t room = size + 2 * padding - kernel;
    if (room < 0) return int64_t{0};
    const int64_t count = room / stride + 1;
    // One more for what is left over, if it starts inside the map.
    const bool more = pool[3] && room % stride != 0 && count * stride < size + padding;
    return more ? count + 1 : count;
  };
  const PoolShape shape = {kernel,
                           stride,
                           padding,
                           input_size[0],
                           input_size[1],
                           windows(input_size[0]),
                           windows(input_size[1])};
  TORCH_CHECK_VALUE(shape.oh > 0 && shape.ow > 0, "a map of ", input_size[0], "x", input_size[1],
                    " is smaller than a window of pool ", pool);
  return shape;
}

namespace {

std::tuple<at::Tensor, at::Tensor> relu_max_pool(const at::Tensor& input, bool relu,
                                                 at::IntArrayRef pool) {
  TORCH_CHECK_VALUE(input.dim() == 4, "input must be [N, C, H, W], got size ", input.sizes());
  const PoolShape shape = pool_shape(pool, input.sizes().slice(2));
  const at::Tensor x = as_rows(input, "input");
  const int64_t batch = x.size(0), channels = x.size(1);
  at::Tensor output = at::empty({batch, channels, shape.oh, shape.ow},
                                x.options().memory_format(at::MemoryFormat::ChannelsLast));
  at::Tensor code = at::empty({batch, shape.oh, shape.ow, channels}, x.options().dtype(at::kByte));
  const float* in = x.const_data_ptr<float>();
  float* out = output.data_ptr<float>();
  uint8_t* codes = code.data_ptr<uint8_t>();
  for_rows(batch * shape.oh * shape.ow, channels, [&](int64_t begin, int64_t end) {
    WUS_DISPATCH(pool_kernels).max_pool(shape, in, channels, relu, begin, end, out, codes);
  });
  return {output, code};
}

std::tuple<at::Tensor, at::Tensor> max_pool_bias_grad(const at::Tensor& grad_output,
                                                      const at::Tensor& code,
                                                      at::IntArrayRef input_size,
                                                      bool need_grad_input, at::IntArrayRef pool) {
  const PoolShape shape = pool_shape(pool, input_size);
  TORCH_CHECK_VALUE(
      grad_output.dim() == 4 && grad_output.size(2) == shape.oh && grad_output.size(3) == shape.ow,
      "grad_output must be [N, C, ", shape.oh, ", ", shape.ow, "] for input_size ", input_size,
      " and pool ", pool, ", got size ", grad_output.sizes());
  const at::Tensor grad = as_rows(grad_output, "grad_output");
  const int64_t batch = grad.size(0), channels = grad.size(1);
  check_bytes(code, "code", {batch, shape.oh, shape.ow, channels});
  const float* g = grad.const_data_ptr<float>();
  const uint8_t* codes = code.const_data_ptr<uint8_t>();
  const auto& kernels = WUS_DISPATCH(pool_kernels);
  const at::Tensor sums = sum_over_rows(
      Rows(grad).rows, channels, channels, [&](int64_t begin, int64_t end, double* sum) {
        const int64_t i = begin * channels;
        kernels.bias_grad(g + i, codes + i, shape.blocked(), end - begin, channels, sum);
      });
  if (!need_grad_input) return {nothing(grad), sums.to(at::kFloat)};
  at::Tensor grad_input = at::empty({batch, channels, shape.height, shape.width},
                                    grad.options().memory_format(at::MemoryFormat::ChannelsLast));
  float* out = grad_input.data_ptr<float>();
  for_rows(batch * shape.height * shape.width, channels, [&](int64_t begin, int64_t end) {
    kernels.unpool(shape, g, codes, channels, begin, end, out);
  });
  return {grad_input, sums.to(at::kFloat)};
}

TORCH_LIBRARY_IMPL(wus, CPU, m) {
  m.impl("relu_max_pool", &relu_max_pool);
  m.impl("max_pool_bias_grad", &max_pool_bias_grad);
}

}  // namespace
}  // namespace wus::cpu
