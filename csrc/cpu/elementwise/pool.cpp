#include <torch/library.h>

#include <tuple>

#include "cpu/elementwise/pool_kernels.h"
#include "cpu/parallel_rows.h"

namespace wus::cpu {
namespace {

std::tuple<at::Tensor, at::Tensor> relu_max_pool(const at::Tensor& input, bool relu) {
  check_poolable(input);
  const at::Tensor x = as_rows(input, "input");
  const int64_t batch = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  const int64_t oh = height / 2, ow = width / 2;
  at::Tensor output = at::empty({batch, channels, oh, ow},
                                x.options().memory_format(at::MemoryFormat::ChannelsLast));
  at::Tensor code = at::empty({batch, oh, ow, channels}, x.options().dtype(at::kByte));
  const float* in = x.const_data_ptr<float>();
  float* out = output.data_ptr<float>();
  uint8_t* codes = code.data_ptr<uint8_t>();
  for_rows(batch * oh * ow, channels, [&](int64_t begin, int64_t end) {
    WUS_DISPATCH(pool_kernels)
        .relu_max_pool(in, height, width, channels, relu, begin, end, out, codes);
  });
  return {output, code};
}

std::tuple<at::Tensor, at::Tensor> max_pool_bias_grad(const at::Tensor& grad_output,
                                                      const at::Tensor& code,
                                                      at::IntArrayRef input_size,
                                                      bool need_grad_input) {
  const int64_t height = input_size[0], width = input_size[1];
  check_pooled(grad_output, input_size);
  const at::Tensor grad = as_rows(grad_output, "grad_output");
  const int64_t batch = grad.size(0), channels = grad.size(1);
  check_bytes(code, "code", {batch, height / 2, width / 2, channels});
  at::Tensor grad_input =
      need_grad_input ? at::empty({batch, channels, height, width},
                                  grad.options().memory_format(at::MemoryFormat::ChannelsLast))
                      : nothing(grad);
  const float* g = grad.const_data_ptr<float>();
  const uint8_t* codes = code.const_data_ptr<uint8_t>();
  float* out = need_grad_input ? grad_input.data_ptr<float>() : nullptr;
  const auto& kernels = WUS_DISPATCH(pool_kernels);
  const at::Tensor sums = sum_over_rows(
      Rows(grad).rows, channels, channels, [&](int64_t begin, int64_t end, double* sum) {
        const int64_t i = begin * channels;
        kernels.bias_grad(g + i, codes + i, end - begin, channels, sum);
        if (out) kernels.unpool(g, codes, height, width, channels, begin, end, out);
      });
  return {grad_input, sums.to(at::kFloat)};
}

TORCH_LIBRARY_IMPL(wus, CPU, m) {
  m.impl("relu_max_pool", &relu_max_pool);
  m.impl("max_pool_bias_grad", &max_pool_bias_grad);
}

}  // namespace
}  // namespace wus::cpu
