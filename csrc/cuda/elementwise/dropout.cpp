#include <ATen/core/Generator.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <torch/library.h>

#include <cmath>
#include <mutex>
#include <optional>
#include <tuple>

#include "cuda/elementwise/dropout_kernels.h"
#include "cuda/launch.h"

namespace wus::cuda {
namespace {

// The generator's next numbers; a captured graph is handed others at each replay.
RandomState draw(const std::optional<at::Generator>& generator) {
  auto* source = at::get_generator_or_default<at::CUDAGeneratorImpl>(
      generator, at::cuda::detail::getDefaultCUDAGenerator());
  const std::lock_guard<std::mutex> lock(source->mutex_);
  const at::PhiloxCudaState state = source->philox_cuda_state(kDrawsAnOctet);
  if (state.captured_) {
    return {0, state.offset_intragraph_, state.seed_.ptr, state.offset_.ptr};
  }
  return {state.seed_.val, state.offset_.val, nullptr, nullptr};
}

std::tuple<at::Tensor, at::Tensor> drop(const at::Tensor& input, double p,
                                        const std::optional<at::Generator>& generator, bool relu) {
  TORCH_CHECK_VALUE(p >= 0 && p <= 1, "p must be a probability between 0 and 1, got ", p);
  check_float(input, "input");
  const c10::cuda::CUDAGuard guard(input.device());
  const at::Tensor x = as_rows(input, "input");
  const Rows shape(x);
  at::Tensor output = empty_rows(x);
  at::Tensor mask = empty_mask(x);
  if (x.numel() == 0) return {output, mask};
  const auto keep_below = static_cast<uint64_t>(std::llround(std::ldexp(1 - p, 32)));
  const float scale = p == 1 ? 0.f : 1.f / static_cast<float>(1 - p);
  // As stock: nothing is drawn where nothing is left to chance.
  const RandomState random = p == 0 || p == 1 ? RandomState{} : draw(generator);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  WUS_DISPATCH_DTYPE(x.scalar_type(), "dropout_mask", [&] {
    cuda::dropout(x.const_data_ptr<scalar_t>(), random, keep_below, scale, relu,
                  output.data_ptr<scalar_t>(), mask.data_ptr<uint8_t>(), shape.rows, shape.channels,
                  stream);
  });
  return {output, mask};
}

std::tuple<at::Tensor, at::Tensor> dropout_mask(const at::Tensor& input, double p,
                                                std::optional<at::Generator> generator) {
  return drop(input, p, generator, false);
}

std::tuple<at::Tensor, at::Tensor> relu_dropout_mask(const at::Tensor& input, double p,
                                                     std::optional<at::Generator> generator,
                                                     const std::optional<at::Tensor>& noise) {
  TORCH_CHECK_NOT_IMPLEMENTED(!noise, "noise drawn beforehand is for the CPU");
  return drop(input, p, generator, true);
}

TORCH_LIBRARY_IMPL(wus, CUDA, m) {
  m.impl("dropout_mask", &dropout_mask);
  m.impl("relu_dropout_mask", &relu_dropout_mask);
}

}  // namespace
}  // namespace wus::cuda
