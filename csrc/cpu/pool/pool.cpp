#include "cpu/pool/pool.h"

#include <torch/library.h>

#include <tuple>

#include "cpu/maps.h"
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
  const int64_t batch = input.size(0), channels = input.size(1);
  at::Tensor output = empty_map(input, channels, shape.oh, shape.ow);
  at::Tensor code =
      at::empty({batch, shape.oh, shape.ow, channels}, input.options().dtype(at::kByte));
  uint8_t* codes = code.data_ptr<uint8_t>();
  for_type(input, "input", [&](auto element) {
    using T = decltype(element);
    const at::Tensor x = as_rows<T>(input, "input");
    const T* in = data<T>(x);
    T* out = mutable_data<T>(output);
    for_rows(batch * shape.oh * shape.ow, channels, [&](int64_t begin, int64_t end) {
      WUS_DISPATCH(pool_kernels<T>()).max_pool(shape, in, channels, relu, begin, end, out, codes);
    });
  });
  return {output, code};
}

template <class T>
std::tuple<at::Tensor, at::Tensor> unpool(const PoolShape& shape, const at::Tensor& grad_output,
                                          const at::Tensor& code, bool need_grad_input) {
  const at::Tensor grad = as_rows<T>(grad_output, "grad_output");
  const int64_t batch = grad.size(0), channels = grad.size(1);
  check_bytes(code, "code", {batch, shape.oh, shape.ow, channels});
  const T* g = data<T>(grad);
  const uint8_t* codes = code.const_data_ptr<uint8_t>();
  const auto& kernels = WUS_DISPATCH(pool_kernels<T>());
  const at::Tensor sums = sum_over_rows(
      Rows(grad).rows, channels, channels, [&](int64_t begin, int64_t end, double* sum) {
        const int64_t i = begin * channels;
        kernels.bias_grad(g + i, codes + i, shape.blocked(), end - begin, channels, sum);
      });
  if (!need_grad_input) return {nothing(grad, kTypeOf<T>), sums.to(at::kFloat)};
  at::Tensor grad_input = empty_map(grad, channels, shape.height, shape.width);
  T* out = mutable_data<T>(grad_input);
  for_rows(batch * shape.height * shape.width, channels, [&](int64_t begin, int64_t end) {
    kernels.unpool(shape, g, codes, channels, begin, end, out);
  });
  return {grad_input, sums.to(at::kFloat)};
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
  return for_type(grad_output, "grad_output", [&](auto element) {
    return unpool<decltype(element)>(shape, grad_output, code, need_grad_input);
  });
}

TORCH_LIBRARY_IMPL(wus, CPU, m) {
  m.impl("relu_max_pool", &relu_max_pool);
  m.impl("max_pool_bias_grad", &max_pool_bias_grad);
}

}  // namespace
}  // namespace wus::cpu
