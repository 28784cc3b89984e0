#include <torch/library.h>

#include <tuple>

#include "cpu/elementwise/mask_kernels.h"
#include "cpu/parallel_rows.h"

namespace wus::cpu {
namespace {

std::tuple<at::Tensor, at::Tensor> relu_into(const at::Tensor& input, const at::Tensor& output) {
  const Rows shape(input);
  at::Tensor mask = empty_mask(input);
  const float* x = input.const_data_ptr<float>();
  float* y = output.data_ptr<float>();
  uint8_t* bits = mask.data_ptr<uint8_t>();
  for_rows(shape.rows, shape.channels, [&](int64_t begin, int64_t end) {
    const int64_t i = begin * shape.channels;
    WUS_DISPATCH(mask_kernels)
        .relu(x + i, y + i, bits + begin * shape.mask_bytes(), end - begin, shape.channels);
  });
  return {output, mask};
}

std::tuple<at::Tensor, at::Tensor> relu_mask(const at::Tensor& input) {
  const at::Tensor x = as_rows(input, "input");
  return relu_into(x, empty_rows(x));
}

std::tuple<at::Tensor, at::Tensor> relu_mask_(at::Tensor input) {
  check_float(input, "input");
  check_dense(input, "input");
  return relu_into(input, input);
}

std::tuple<at::Tensor, at::Tensor> add_relu_mask(const at::Tensor& input, const at::Tensor& other) {
  const at::Tensor x = as_rows(input, "input");
  const at::Tensor z = as_rows(other, "other");
  check_same_size(z, "other", x, "input");
  const Rows shape(x);
  at::Tensor output = empty_rows(x);
  at::Tensor mask = empty_mask(x);
  const float* x_data = x.const_data_ptr<float>();
  const float* z_data = z.const_data_ptr<float>();
  float* y_data = output.data_ptr<float>();
  uint8_t* bits = mask.data_ptr<uint8_t>();
  for_rows(shape.rows, shape.channels, [&](int64_t begin, int64_t end) {
    const int64_t i = begin * shape.channels;
    WUS_DISPATCH(mask_kernels)
        .add_relu(x_data + i, z_data + i, y_data + i, bits + begin * shape.mask_bytes(),
                  end - begin, shape.channels);
  });
  return {output, mask};
}

TORCH_LIBRARY_IMPL(wus, CPU, m) {
  m.impl("relu_mask", &relu_mask);
  m.impl("relu_mask_", &relu_mask_);
  m.impl("add_relu_mask", &add_relu_mask);
}

}  // namespace
}  // namespace wus::cpu
