#include "cpu/winograd/direct.h"

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>

#include "common/activation.h"
#include "cpu/gemm/kernels.h"

namespace wus::cpu {

using at::Tensor;

namespace {

// By WinogradScheme; the inverses of the transforms in schemes.inl.
constexpr Recovery kRecoveries[] = {
    {3, {{1, 0, 1}, {1, 0, 0}, {1, 1, 0}}},
    {4, {{1, 0, 0, 0}, {0, 1, -1, 0}, {0, 0, 0, 1}}},
    {6, {{1, 0, 0, 0, 0, 0}, {0, 1.5f, 1.5f, 0, 0, 0}, {0, 0, 0, 0, 0, 1}}},
};

// The map [images, channels, height, width], channels_last, that a source reads.
Tensor source_map(const WinogradInput& in, WinogradSource source, int64_t images,
                  const at::TensorOptions& options) {
  const int64_t panel = WUS_DISPATCH(gemm_kernels).panel;
  const int64_t row = divide_up(in.channels, panel) * panel;  // whole vectors are written
  WinogradInput single = in;
  single.tile_rows = in.height;
  single.tile_cols = in.width;
  Tensor map = at::empty({images, in.height, in.width, row}, options.memory_format(std::nullopt));
  float* data = map.mutable_data_ptr<float>();
  const auto load = WUS_DISPATCH(winograd_kernels).pixels[static_cast<int>(source)];
  at::parallel_for(0, images * in.height * in.width, 64, [&](int64_t begin, int64_t end) {
    load(single, begin, end, {data + begin * row, row, 0, panel, nullptr}, nullptr);
  });
  return map.narrow(3, 0, in.channels)
      .permute({0, 3, 1, 2})
      .contiguous(at::MemoryFormat::ChannelsLast);
}

template <class... Arguments>
std::tuple<Tensor, Tensor> call(const char* name, Arguments... arguments) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(name, "")
      .typed<std::tuple<Tensor, Tensor>(Arguments...)>()
      .call(arguments...);
}

}  // namespace

Tensor recover_weight(const Tensor& packed, const Recovery& recovery, int64_t inputs,
                      int64_t outputs) {
  const int64_t panel = WUS_DISPATCH(gemm_kernels).panel, plane = packed.size(1);
  const int points = recovery.points;
  const float* products = packed.const_data_ptr<float>();
  Tensor weight = at::empty({outputs, inputs, 3, 3}, packed.options());
  float* taps = weight.mutable_data_ptr<float>();
  at::parallel_for(0, outputs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * inputs; i < end * inputs; ++i) {
      const int64_t output = i / inputs, input = i % inputs;
      const float* from = products + (output / panel * inputs + input) * panel + output % panel;
      for (int tap = 0; tap < 9; ++tap) {
        const float *rows = recovery.rows[tap / 3], *cols = recovery.rows[tap % 3];
        float sum = 0;
        for (int row = 0; row < points; ++row) {
          for (int col = 0; col < points; ++col) {
            const float factor = rows[row] * cols[col];
            if (factor != 0) sum += factor * from[(row * points + col) * plane];
          }
        }
        taps[i * 9 + tap] = sum;
      }
    }
  });
  return weight;
}

std::tuple<Tensor, Tensor> convolve_directly(const Convolution& conv, const Tensor& packed,
                                             const std::optional<Tensor>& bias, int64_t images) {
  const at::NoGradGuard no_grad;
  const Tensor map = source_map(conv.in, conv.source, images, packed.options());
  const Tensor weight = recover_weight(packed, kRecoveries[static_cast<int>(conv.scheme.kernel)],
                                       conv.in.channels, conv.out.channels);
  const int64_t padding = conv.in.padding;
  const Tensor y =
      at::convolution(map, weight, bias, {1, 1}, {padding, padding}, {1, 1}, false, {0, 0}, 1)
          .contiguous(at::MemoryFormat::ChannelsLast);
  switch (conv.epilogue) {
    case WinogradEpilogue::relu: {
      const auto [output, mask] = call<Tensor, int64_t, double>("wus::activate_", y, kRelu, 0);
      return {output, mask.view({images, conv.out.height, conv.out.width, -1})};
    }
    case WinogradEpilogue::pool:
      return call<const Tensor&, bool, at::IntArrayRef>("wus::relu_max_pool", y, true,
                                                        {{2, 2, 0, 0}});
    case WinogradEpilogue::stats: {
      const auto [mean, var] = call<const Tensor&>("wus::batch_norm_stats", y);
      return {y, at::stack({mean, var})};
    }
    case WinogradEpilogue::none:
      break;
  }
  return {y, at::empty({0}, packed.options().dtype(at::kByte))};
}

Tensor weigh_directly(const WeightGradient& work, const Tensor& input, int64_t padding) {
  const at::NoGradGuard no_grad;
  const Tensor grad = source_map(work.grad, work.source, input.size(0), input.options());
  const Tensor weight = at::empty({grad.size(1), input.size(1), 3, 3},
                                  input.options().memory_format(at::MemoryFormat::ChannelsLast));
  return std::get<1>(at::convolution_backward(grad, input, weight, std::nullopt, {1, 1},
                                              {padding, padding}, {1, 1}, false, {0, 0}, 1,
                                              {false, true, false}));
}

}  // namespace wus::cpu
