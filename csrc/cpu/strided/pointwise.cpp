#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/gemm/kernels.h"
#include "cpu/scratch.h"
#include "cpu/strided/strided.h"
#include "cpu/winograd/schedule.h"

namespace wus::cpu {
namespace {

constexpr int64_t kBlock = 56;  // pixels, whole passes of the GEMM

}  // namespace

void pointwise_forward(const WinogradInput& in, const WinogradOutput& out, int64_t images,
                       PixelStride stride, const float* packed) {
  const auto& gemm = WUS_DISPATCH(gemm_kernels);
  const int64_t pixels = images * out.height * out.width,
                panels = divide_up(out.channels, gemm.panel);
  const bool in_place = out.bias == nullptr && out.channels % gemm.panel == 0;
  const int64_t x_row = padded_row(in.channels), y_row = padded_row(out.channels);
  at::parallel_for(0, divide_up(pixels, kBlock), 1, [&](int64_t begin, int64_t end) {
    float* x = scratch(kBlock * (x_row + y_row));
    float* y = x + kBlock * x_row;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlock, rows = std::min(kBlock, pixels - first);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t col = (first + i) % out.width, line = (first + i) / out.width;
        const int64_t row = line % out.height, image = line / out.height;
        const int64_t from = (image * in.height + row * stride.y) * in.width + col * stride.x;
        std::copy_n(in.x + from * in.channels, in.channels, x + i * x_row);
      }
      if (in_place) {
        gemm.run(x, x_row, packed, out.y + first * out.channels, out.channels, rows, in.channels,
                 panels, false);
        continue;
      }
      gemm.run(x, x_row, packed, y, y_row, rows, in.channels, panels, false);
      for (int64_t i = 0; i < rows; ++i) {
        float* to = out.y + (first + i) * out.channels;
        std::copy_n(y + i * y_row, out.channels, to);
        for (int64_t c = 0; out.bias != nullptr && c < out.channels; ++c) to[c] += out.bias[c];
      }
    }
  });
}

void pointwise_dgrad(const WinogradInput& in, const WinogradOutput& out, int64_t images,
                     PixelStride stride, const float* packed) {
  const auto& gemm = WUS_DISPATCH(gemm_kernels);
  const int64_t panels = divide_up(out.channels, gemm.panel), y_row = padded_row(out.channels);
  // Whole lines, so that each line of the output is written by one thread, zeros and all.
  const int64_t lines = images * in.height;
  const int64_t step = std::max<int64_t>(1, kBlock / in.width);
  at::parallel_for(0, divide_up(lines, step), 1, [&](int64_t begin, int64_t end) {
    float* y = scratch(step * in.width * y_row);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * step, last = std::min(lines, first + step);
      gemm.run(in.x + first * in.width * in.channels, in.channels, packed, y, y_row,
               (last - first) * in.width, in.channels, panels, false);
      const float* from = y;
      for (int64_t line = first; line < last; ++line) {
        const int64_t row = line % in.height * stride.y, image = line / in.height;
        const int64_t next = line % in.height + 1 == in.height ? out.height : row + stride.y;
        float* to = out.y + (image * out.height + row) * out.width * out.channels;
        for (int64_t col = 0; col < out.width; ++col, to += out.channels) {
          if (col % stride.x != 0) {
            std::fill_n(to, out.channels, 0.f);
          } else {
            std::copy_n(from, out.channels, to);
            from += y_row;
          }
        }
        std::fill_n(to, (next - row - 1) * out.width * out.channels, 0.f);
      }
    }
  });
}

void pointwise_pack(const WinogradWeight& weight, int64_t inputs, int64_t outputs, float* packed) {
  const int64_t panel = WUS_DISPATCH(gemm_kernels).panel;
  at::parallel_for(0, divide_up(outputs, panel), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* to = packed + i * inputs * panel;
      for (int64_t k = 0; k < inputs; ++k) {
        for (int64_t column = i * panel; column < (i + 1) * panel; ++column) {
          *to++ = column < outputs ? weight.data[column * weight.output + k * weight.input] : 0.f;
        }
      }
    }
  });
  std::fill_n(packed + plane_size(inputs, outputs) - panel, panel, 0.f);
}

}  // namespace wus::cpu
