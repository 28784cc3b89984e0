// Products of linear layers on weights that are not packed beforehand, for batches that are small
// beside the weight: it is read once, in blocks that a cache holds. Every output is summed by one
// thread in one order, whatever their number.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "cpu/gemm/kernels.h"
#include "cpu/scratch.h"
#include "cpu/winograd/schedule.h"

namespace wus::cpu {
namespace {

using at::Tensor;

constexpr int64_t kForwardDepth = 512;                     // of a block of the weight, forward
constexpr int64_t kDgradDepth = 256, kDgradColumns = 512;  // and in the data gradient
constexpr int64_t kLine = 16;                              // floats

void check(const Tensor& t, const char* name, int64_t dim) {
  TORCH_CHECK_VALUE(t.dim() == dim, "linear: ", name, " must have ", dim, " dimension",
                    dim == 1 ? "" : "s", ", got shape ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat, "linear: ", name, " must be float32, got ",
                   t.scalar_type());
}

void check_features(const Tensor& t, const char* name, int64_t features) {
  TORCH_CHECK_VALUE(t.size(-1) == features, "linear: ", name, " must have ", features,
                    " features for this weight, got shape ", t.sizes());
}

void prefetch(const float* from, int64_t floats) {
  for (int64_t i = 0; i < floats; i += kLine) __builtin_prefetch(from + i, 0, 2);
}

// x[rows][columns] -> [columns][panel]; what is beyond the rows is zero.
void transpose(const float* x, int64_t rows, int64_t columns, int64_t panel, float* to) {
  for (int64_t first = 0; first < columns; first += kLine) {
    const int64_t last = std::min(columns, first + kLine);
    for (int64_t i = 0; i < panel; ++i) {
      for (int64_t j = first; j < last; ++j) {
        to[j * panel + i] = i < rows ? x[i * columns + j] : 0.f;
      }
    }
  }
}

// rows x columns of a matrix -> [panels][rows][panel]; what is beyond the columns is zero.
void pack(const float* x, int64_t row, int64_t rows, int64_t columns, int64_t panel, float* to) {
  for (int64_t i = 0; i < rows; ++i, x += row, to += panel) {
    prefetch(x + rows * row, columns);
    for (int64_t first = 0; first < columns; first += panel) {
      const int64_t width = std::min(panel, columns - first);
      std::fill_n(std::copy_n(x + first, width, to + first * rows), panel - width, 0.f);
    }
  }
}

}  // namespace

Tensor linear_forward(const Tensor& input, const Tensor& weight,
                      const std::optional<Tensor>& bias) {
  check(input, "input", 2);
  check(weight, "weight", 2);
  const int64_t batch = input.size(0), inputs = weight.size(1), outputs = weight.size(0);
  check_features(input, "input", inputs);
  if (bias.has_value()) {
    check(*bias, "bias", 1);
    check_features(*bias, "bias", outputs);
  }
  const Tensor x = input.contiguous(), w = weight.contiguous();
  const Tensor b = bias.has_value() ? bias->contiguous() : Tensor();
  const float* shift = b.defined() ? b.const_data_ptr<float>() : nullptr;
  Tensor y = at::empty({batch, outputs}, x.options());
  if (inputs == 0) return shift == nullptr ? y.zero_() : y.copy_(b.expand_as(y));
  float* to = y.mutable_data_ptr<float>();

  // output^T = weight * input^T: rows of the weight are read as they lie.
  const auto& gemm = WUS_DISPATCH(gemm_kernels);
  const int64_t panels = divide_up(batch, gemm.panel), columns = panels * gemm.panel;
  const int64_t rows = 2 * gemm.rows, a_row = padded_row(kForwardDepth);
  const int64_t own = rows * (a_row + columns);
  Tensor packed = at::empty({inputs * columns}, x.options());
  float* x_panels = packed.mutable_data_ptr<float>();
  float* blocks = scratch(at::get_num_threads() * own);
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * gemm.panel; first < end * gemm.panel; first += gemm.panel) {
      transpose(x.const_data_ptr<float>() + first * inputs,
                std::min<int64_t>(gemm.panel, batch - first), inputs, gemm.panel,
                x_panels + first * inputs);
    }
  });
  at::parallel_for(0, divide_up(outputs, rows), 1, [&](int64_t begin, int64_t end) {
    float* a = blocks + at::get_thread_num() * own;
    float* c = a + rows * a_row;
    for (int64_t first = begin * rows; first < std::min(outputs, end * rows); first += rows) {
      const int64_t height = std::min(rows, outputs - first);
      for (int64_t k = 0; k < inputs; k += kForwardDepth) {
        const int64_t depth = std::min(kForwardDepth, inputs - k);
        for (int64_t i = 0; i < height; ++i) {
          const float* from = w.const_data_ptr<float>() + (first + i) * inputs + k;
          prefetch(from + depth, depth);
          std::copy_n(from, depth, a + i * a_row);
        }
        for (int64_t m = 0; m < columns; m += gemm.panel) {
          gemm.run(a, a_row, x_panels + m * inputs + k * gemm.panel, c + m, columns, height, depth,
                   1, k > 0);
        }
      }
      for (int64_t m = 0; m < batch; ++m) {
        for (int64_t i = 0; i < height; ++i) {
          to[m * outputs + first + i] =
              c[i * columns + m] + (shift == nullptr ? 0.f : shift[first + i]);
        }
      }
    }
  });
  return y;
}

Tensor linear_dgrad(const Tensor& grad_output, const Tensor& weight) {
  check(grad_output, "grad_output", 2);
  check(weight, "weight", 2);
  const int64_t batch = grad_output.size(0), inputs = weight.size(1), outputs = weight.size(0);
  check_features(grad_output, "grad_output", outputs);
  const Tensor g = grad_output.contiguous(), w = weight.contiguous();
  Tensor x = at::empty({batch, inputs}, g.options());
  if (outputs == 0) return x.zero_();
  float* to = x.mutable_data_ptr<float>();

  const auto& gemm = WUS_DISPATCH(gemm_kernels);
  const int64_t threads = at::get_num_threads();
  const int64_t share = divide_up(divide_up(inputs, threads), gemm.panel) * gemm.panel;
  const int64_t columns = std::clamp<int64_t>(share, gemm.panel, kDgradColumns);
  const int64_t g_row = padded_row(outputs), c_row = padded_row(columns);
  const int64_t own = kDgradDepth * columns + batch * c_row;
  Tensor padded = at::empty({batch * g_row}, g.options());
  float* g_rows = padded.mutable_data_ptr<float>();
  float* blocks = scratch(threads * own);
  at::parallel_for(0, batch, 16, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      std::copy_n(g.const_data_ptr<float>() + m * outputs, outputs, g_rows + m * g_row);
    }
  });
  at::parallel_for(0, divide_up(inputs, columns), 1, [&](int64_t begin, int64_t end) {
    float* packed = blocks + at::get_thread_num() * own;
    float* c = packed + kDgradDepth * columns;
    for (int64_t first = begin * columns; first < std::min(inputs, end * columns);
         first += columns) {
      const int64_t width = std::min(columns, inputs - first);
      for (int64_t k = 0; k < outputs; k += kDgradDepth) {
        const int64_t depth = std::min(kDgradDepth, outputs - k);
        pack(w.const_data_ptr<float>() + k * inputs + first, inputs, depth, width, gemm.panel,
             packed);
        gemm.run(g_rows + k, g_row, packed, c, c_row, batch, depth, divide_up(width, gemm.panel),
                 k > 0);
      }
      for (int64_t m = 0; m < batch; ++m) {
        std::copy_n(c + m * c_row, width, to + m * inputs + first);
      }
    }
  });
  return x;
}

TORCH_LIBRARY_IMPL(wus, CPU, m) {
  m.impl("linear_forward", linear_forward);
  m.impl("linear_dgrad", linear_dgrad);
}

}  // namespace wus::cpu
