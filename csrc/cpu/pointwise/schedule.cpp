#include "cpu/pointwise/schedule.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/batch_norm/kernels.h"
#include "cpu/divide.h"
#include "cpu/gemm/kernels.h"
#include "cpu/range_sums.h"
#include "cpu/scratch.h"

namespace wus::cpu {
namespace {

// Rows in blocks, whole passes of the GEMM, and ranges of blocks that share a sum.
struct Blocks {
  int64_t all, rows, count, ranges;

  explicit Blocks(int64_t all) : all(all) {
    constexpr int64_t kMost = 56, kWanted = 16, kMostRanges = 64;
    const int64_t pass = WUS_DISPATCH(gemm_kernels).rows;
    rows = std::clamp(divide_up(divide_up(all, kWanted), pass), int64_t{1}, kMost / pass) * pass;
    count = divide_up(all, rows);
    ranges = std::clamp<int64_t>(count, 1, kMostRanges);
  }

  int64_t first(int64_t block) const { return std::min(all, block * rows); }
  // Of a range's first block.
  int64_t start(int64_t range) const { return count * range / ranges; }
};

// Rows of a matrix in memory: where they are, and how far apart.
struct Rows {
  const float* data;
  int64_t stride;
};

// Neighbouring rows of one multiple of 1 KiB would share few cache sets.
bool spread(int64_t channels) { return channels % 256 != 0; }

// Where a map's rows from `first` on are to be read: where they lie, or in `memory`.
Rows where_rows(const float* map, int64_t channels, int64_t first, const float* memory) {
  if (spread(channels)) return {map + first * channels, channels};
  return {memory, padded_row(channels)};
}

Rows where_rows(const ActivationGrad<float>& op, const NormCoefficients* norm, int64_t first,
                const float* memory) {
  const bool plain = op.act == kNone && !norm && spread(op.channels);
  if (plain) return {op.grad + first * op.channels, op.channels};
  return {memory, padded_row(op.channels)};
}

// Has rows [first, last) there.
Rows input_rows(const float* map, int64_t channels, int64_t first, int64_t last, float* memory) {
  const Rows rows = where_rows(map, channels, first, memory);
  if (rows.data == memory) {
    for (int64_t i = first; i < last; ++i) {
      std::copy_n(map + i * channels, channels, memory + (i - first) * rows.stride);
    }
  }
  return rows;
}

Rows gradient_rows(const ActivationGrad<float>& op, const NormCoefficients* norm, int64_t first,
                   int64_t last, float* memory) {
  const Rows rows = where_rows(op, norm, first, memory);
  if (rows.data == memory) {
    WUS_DISPATCH(activation_kernels<float>())
        .backward(op, norm, first, last, {memory, rows.stride}, nullptr);
  }
  return rows;
}

// c[rows][columns] = a[rows][depth] * b
void multiply(const Rows& a, const float* b, float* c, int64_t rows, int64_t depth, int64_t columns,
              bool accumulate) {
  const auto& gemm = WUS_DISPATCH(gemm_kernels);
  const int64_t panels = columns / gemm.panel, whole = panels * gemm.panel;
  gemm.run(a.data, a.stride, b, c, columns, rows, depth, panels, accumulate);
  if (whole < columns) {
    gemm.run_part(a.data, a.stride, b + whole * depth, c + whole, columns, rows, depth,
                  columns - whole, accumulate);
  }
}

void forward_block(const PointwiseForward& work, int64_t first, int64_t last, float* memory,
                   double* sums) {
  const int64_t rows = last - first, outputs = work.outputs;
  float* output = work.output + first * outputs;
  float* product = work.following.kept ? work.following.kept + first * outputs : output;
  if (work.bias) {
    for (int64_t i = 0; i < rows; ++i) std::copy_n(work.bias, outputs, product + i * outputs);
  }
  multiply(input_rows(work.input, work.inputs, first, last, memory), work.packed, product, rows,
           work.inputs, outputs, work.bias != nullptr);
  if (sums) WUS_DISPATCH(batch_norm_kernels<float>()).moments(product, rows, outputs, sums);
  if (work.following.act == kNone) return;
  const Activated<float> op = {
      product, nullptr, nullptr, nullptr, outputs, work.following.act, work.following.slope};
  WUS_DISPATCH(activation_kernels<float>())
      .forward(op, 0, rows, {output, outputs},
               work.following.mask ? work.following.mask + first * mask_bytes(outputs) : nullptr);
}

// The gradient of the input's rows [first, last), from those of the output in front of all that
// follows.
void dgrad_block(const PointwiseBackward& work, const Rows& grad, int64_t first, int64_t last) {
  multiply(grad, work.packed, work.grad_input + first * work.inputs, last - first, work.outputs,
           work.inputs, false);
}

// [ranges][outputs][inputs] added in order.
void add_ranges(const float* sums, int64_t ranges, int64_t outputs, int64_t inputs,
                float* grad_weight) {
  const int64_t all = outputs * inputs;
  at::parallel_for(0, all, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double sum = 0;
      for (int64_t range = 0; range < ranges; ++range) sum += sums[range * all + i];
      grad_weight[i] = static_cast<float>(sum);
    }
  });
}

// A small weight's gradient: each range sums its own while its rows are in a cache.
void run_by_ranges(const PointwiseBackward& work) {
  Blocks blocks(work.rows);
  const int64_t all = work.grad_weight ? work.outputs * work.inputs : 0;
  constexpr int64_t kMostFloats = int64_t{1} << 20, kFewestRanges = 16;
  if (all > 0) {
    blocks.ranges = std::min(blocks.ranges, std::max<int64_t>(kFewestRanges, kMostFloats / all));
  }
  const int64_t grad_floats = blocks.rows * padded_row(work.outputs);
  const int64_t own = grad_floats + blocks.rows * padded_row(work.inputs);
  float* memory = scratch(at::get_num_threads() * own + blocks.ranges * all);
  float* weights = memory + at::get_num_threads() * own;
  std::fill_n(weights, blocks.ranges * all, 0.f);
  at::parallel_for(0, blocks.ranges, 1, [&](int64_t begin, int64_t end) {
    float* mine = memory + at::get_thread_num() * own;
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t block = blocks.start(i); block < blocks.start(i + 1); ++block) {
        const int64_t first = blocks.first(block), last = blocks.first(block + 1);
        const Rows grad = gradient_rows(work.grad, work.norm, first, last, mine);
        if (work.grad_input) dgrad_block(work, grad, first, last);
        if (!work.grad_weight) continue;
        const Rows input = input_rows(work.input, work.inputs, first, last, mine + grad_floats);
        WUS_DISPATCH(gemm_kernels)
            .run_outer(grad.data, grad.stride, input.data, input.stride, weights + i * all,
                       work.inputs, work.outputs, work.inputs, last - first, true);
      }
    }
  });
  if (work.grad_weight) {
    add_ranges(weights, blocks.ranges, work.outputs, work.inputs, work.grad_weight);
  }
}

// A large one's: rounds of as many rows as a cache holds, of which threads sum tiles of the weight.
void run_by_rounds(const PointwiseBackward& work) {
  constexpr int64_t kCacheFloats = int64_t{1} << 20, kTileRows = 56, kTileColumns = 64;
  const Blocks blocks(work.rows);
  const int64_t grad_row = padded_row(work.outputs), input_row = padded_row(work.inputs);
  const int64_t step = std::max<int64_t>(1, kCacheFloats / ((grad_row + input_row) * blocks.rows));
  float* grads = scratch(step * blocks.rows * (grad_row + input_row));
  float* inputs = grads + step * blocks.rows * grad_row;
  const int64_t tile_rows = divide_up(work.outputs, kTileRows);
  const int64_t tile_columns = divide_up(work.inputs, kTileColumns);
  for (int64_t start = 0; start < blocks.count; start += step) {
    const int64_t stop = std::min(blocks.count, start + step), base = blocks.first(start);
    at::parallel_for(start, stop, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = blocks.first(block), last = blocks.first(block + 1);
        const Rows grad =
            gradient_rows(work.grad, work.norm, first, last, grads + (first - base) * grad_row);
        if (work.grad_input) dgrad_block(work, grad, first, last);
        input_rows(work.input, work.inputs, first, last, inputs + (first - base) * input_row);
      }
    });
    const Rows grad = where_rows(work.grad, work.norm, base, grads);
    const Rows input = where_rows(work.input, work.inputs, base, inputs);
    at::parallel_for(0, tile_rows * tile_columns, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / tile_columns * kTileRows, column = i % tile_columns * kTileColumns;
        WUS_DISPATCH(gemm_kernels)
            .run_outer(grad.data + row, grad.stride, input.data + column, input.stride,
                       work.grad_weight + row * work.inputs + column, work.inputs,
                       std::min(kTileRows, work.outputs - row),
                       std::min(kTileColumns, work.inputs - column), blocks.first(stop) - base,
                       start > 0);
      }
    });
  }
}

}  // namespace

int64_t pointwise_packed_size(int64_t inputs, int64_t outputs) {
  const int64_t panel = WUS_DISPATCH(gemm_kernels).panel;
  return divide_up(outputs, panel) * inputs * panel;
}

void pack_pointwise(const float* weight, int64_t output_stride, int64_t input_stride,
                    int64_t inputs, int64_t outputs, float* packed) {
  const int64_t panel = WUS_DISPATCH(gemm_kernels).panel;
  at::parallel_for(0, divide_up(outputs, panel), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* from = weight + i * panel * output_stride;
      float* to = packed + i * inputs * panel;
      const int64_t width = std::min(panel, outputs - i * panel);
      // A few inputs at a time: a cache line of each output's, if inputs are neighbours.
      constexpr int64_t kInputs = 16;
      for (int64_t first = 0; first < inputs; first += kInputs) {
        const int64_t last = std::min(inputs, first + kInputs);
        for (int64_t column = 0; column < panel; ++column) {
          for (int64_t k = first; k < last; ++k) {
            to[k * panel + column] =
                column < width ? from[column * output_stride + k * input_stride] : 0.f;
          }
        }
      }
    }
  });
}

at::Tensor run_pointwise(const PointwiseForward& work, bool want_sums) {
  const Blocks blocks(work.rows);
  const RangeSums sums(want_sums ? blocks.ranges : 0, 2 * work.outputs);
  at::parallel_for(0, blocks.ranges, 1, [&](int64_t begin, int64_t end) {
    float* memory = scratch(blocks.rows * padded_row(work.inputs));
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t block = blocks.start(i); block < blocks.start(i + 1); ++block) {
        forward_block(work, blocks.first(block), blocks.first(block + 1), memory, sums.of(i));
      }
    }
  });
  return sums.total();
}

void run_pointwise_backward(const PointwiseBackward& work) {
  constexpr int64_t kSmallWeight = int64_t{1} << 16;
  const bool small = !work.grad_weight || work.outputs * work.inputs <= kSmallWeight;
  small || work.rows == 0 ? run_by_ranges(work) : run_by_rounds(work);
}

}  // namespace wus::cpu
