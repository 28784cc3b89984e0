#include "cpu/depthwise/schedule.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/batch_norm/kernels.h"
#include "cpu/divide.h"
#include "cpu/range_sums.h"
#include "cpu/scratch.h"

namespace wus::cpu {
namespace {

const DepthwiseKernels& kernels_for(const DepthwiseShape& shape) {
  return WUS_DISPATCH(depthwise_kernels).by[shape.kernel == 5][shape.stride - 1];
}

// Floats from one pixel to the next: a multiple of 1 KiB would put neighbours in few cache sets.
int64_t pixel_stride(int64_t channels) { return channels % 256 == 0 ? channels + 16 : channels; }

// The last rows of a map, zeros beside them.
class Ring {
 public:
  Ring(int64_t slots, int64_t before, int64_t pixels, int64_t channels)
      : slots_(slots), before_(before), pixel_(pixel_stride(channels)), row_(pixels * pixel_) {}

  int64_t floats() const { return slots_ * row_; }
  int64_t pixel() const { return pixel_; }
  void place(float* memory) {
    data_ = memory;
    std::fill_n(data_, floats(), 0.f);
  }
  float* start(int64_t row) const { return data_ + row % slots_ * row_; }
  RowsOut<float> inside(int64_t row) const { return {start(row) + before_ * pixel_, pixel_}; }

 private:
  int64_t slots_, before_, pixel_, row_;
  float* data_ = nullptr;
};

// The input's rows as the taps reach them.
Ring input_ring(const DepthwiseShape& s) {
  const int64_t reach = (s.ow - 1) * s.stride + s.kernel;
  return {s.kernel, s.padding_x, std::max(reach, s.padding_x + s.width), s.channels};
}

// The output gradient's rows as those of the data gradient reach them.
Ring gradient_ring(const DepthwiseShape& s) {
  const int64_t before = (s.kernel - 1) / s.stride;
  return {before + 1, before, before + (s.width - 1 + s.padding_x) / s.stride + 1, s.channels};
}

// Rows q of an image in backward: one for each row of the gradient, and more where the data
// gradient has rows beyond.
int64_t rows_of_image(const DepthwiseShape& s) {
  return (s.height - 1 + s.padding_y) / s.stride + 1;
}

// [channels][taps] -> [taps][channels]
std::vector<float> transposed(const float* weight, int64_t taps, int64_t channels, int64_t stride) {
  std::vector<float> to(taps * stride);
  for (int64_t tap = 0; tap < taps; ++tap) {
    for (int64_t c = 0; c < channels; ++c) to[tap * stride + c] = weight[c * taps + tap];
  }
  return to;
}

// The rows of every image in blocks; ranges of blocks that share a sum.
struct Blocks {
  int64_t rows, in_image, count, ranges;

  Blocks(int64_t images, int64_t rows_of_image, int64_t most_ranges) {
    constexpr int64_t kWanted = 64, kFewestRows = 8;
    rows = std::clamp(divide_up(images * rows_of_image, kWanted),
                      std::min(kFewestRows, rows_of_image), rows_of_image);
    in_image = divide_up(rows_of_image, rows);
    count = images * in_image;
    ranges = std::max<int64_t>(1, std::min(count, most_ranges));
  }

  // body(image, first row, last row) for the blocks of a range.
  template <class Body>
  void for_range(int64_t range, int64_t rows_of_image, const Body& body) const {
    for (int64_t i = count * range / ranges; i < count * (range + 1) / ranges; ++i) {
      const int64_t first = i % in_image * rows;
      body(i / in_image, first, std::min(rows_of_image, first + rows));
    }
  }
};

// Reads the input's rows into their ring up to the one before `end`.
template <class T>
class InputRows {
 public:
  InputRows(const DepthwiseShape& shape, const T* map, const Ring& ring)
      : s_(shape), map_(map), ring_(ring) {}

  void begin(int64_t image, int64_t output_row) {
    image_ = image;
    next_ = std::max<int64_t>(0, output_row * s_.stride - s_.padding_y);
  }

  // The rows under the taps of an output row.
  DepthwiseRows under(int64_t output_row) {
    const int64_t top = output_row * s_.stride - s_.padding_y;
    for (const int64_t end = std::min(s_.height, top + s_.kernel); next_ < end; ++next_) {
      read(next_);
    }
    DepthwiseRows rows{};
    rows.pixel = ring_.pixel();
    for (int64_t dy = 0; dy < s_.kernel; ++dy) {
      const int64_t row = top + dy;
      rows.row[dy] = row >= 0 && row < s_.height ? ring_.start(row) : nullptr;
    }
    return rows;
  }

 private:
  void read(int64_t row) const {
    const int64_t first = (image_ * s_.height + row) * s_.width;
    const ActivationGrad<T> as_it_is = {.grad = map_, .channels = s_.channels, .act = kNone};
    WUS_DISPATCH(activation_kernels<T>())
        .backward_to_floats(as_it_is, nullptr, first, first + s_.width, ring_.inside(row), nullptr);
  }

  const DepthwiseShape& s_;
  const T* map_;
  const Ring& ring_;
  int64_t image_ = 0, next_ = 0;
};

// Where floats are made that go to a map's row: there, if its elements are floats.
template <class T>
float* made_in(T* row, float* memory) {
  if constexpr (std::is_same_v<T, float>) {
    return row;
  } else {
    return memory;
  }
}

// Takes floats made there to the map's row as they are.
template <class T>
void take(const float* floats, int64_t pixels, int64_t channels, T* row) {
  if (static_cast<const void*>(floats) == row) return;
  const Activated<float> as_they_are = {.x = floats, .channels = channels, .act = kNone};
  WUS_DISPATCH(activation_kernels<T>())
      .forward_from_floats(as_they_are, 0, pixels, {row, channels}, nullptr);
}

template <class T>
void forward_range(const DepthwiseForward<T>& work, const Blocks& blocks, int64_t range,
                   const DepthwiseTaps& taps, Ring ring, double* sums) {
  const DepthwiseShape& s = work.shape;
  const Following<T>& following = work.following;
  const auto& kernels = kernels_for(s);
  float* memory = scratch(ring.floats() + s.ow * s.channels);
  ring.place(memory);
  InputRows<T> input(s, work.input, ring);
  blocks.for_range(range, s.oh, [&](int64_t image, int64_t first, int64_t last) {
    input.begin(image, first);
    for (int64_t row = first; row < last; ++row) {
      const int64_t pixel = (image * s.oh + row) * s.ow, i = pixel * s.channels;
      T* output = work.output + i;
      T* as_it_is = following.kept ? following.kept + i : following.act == kNone ? output : nullptr;
      float* product = made_in(as_it_is ? as_it_is : output, memory + ring.floats());
      kernels.forward(input.under(row), taps, work.bias, s.channels, s.ow, product);
      if (sums) WUS_DISPATCH(batch_norm_kernels<float>()).moments(product, s.ow, s.channels, sums);
      if (as_it_is) take(product, s.ow, s.channels, as_it_is);
      if (following.act == kNone) continue;
      const Activated<float> op = {product,    nullptr,       nullptr,        nullptr,
                                   s.channels, following.act, following.slope};
      WUS_DISPATCH(activation_kernels<T>())
          .forward_from_floats(
              op, 0, s.ow, {output, s.channels},
              following.mask ? following.mask + pixel * mask_bytes(s.channels) : nullptr);
    }
  });
}

template <class T>
at::Tensor run_forward(const DepthwiseForward<T>& work, bool want_sums) {
  const DepthwiseShape& s = work.shape;
  const Ring ring = input_ring(s);
  const std::vector<float> weight =
      transposed(work.weight, s.kernel * s.kernel, s.channels, ring.pixel());
  const DepthwiseTaps taps = {weight.data(), ring.pixel()};
  const Blocks blocks(s.images, s.oh, 64);
  RangeSums sums(want_sums ? blocks.ranges : 0, 2 * s.channels);
  at::parallel_for(0, blocks.ranges, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      forward_range(work, blocks, i, taps, ring, sums.of(i));
    }
  });
  return sums.total();
}

// Sums of a weight's gradient in float, which are added to double ones before they grow long.
class WeightSums {
 public:
  WeightSums(float* memory, int64_t taps, int64_t channels, int64_t stride, double* total)
      : data_(memory), taps_(taps), channels_(channels), stride_(stride), total_(total) {
    std::fill_n(data_, taps_ * stride_, 0.f);
  }

  float* grow(int64_t pixels) {
    constexpr int64_t kChain = 128;
    if (pixels_ > 0 && pixels_ + pixels > kChain) flush();
    pixels_ += pixels;
    return data_;
  }

  void flush() {
    for (int64_t tap = 0; tap < taps_; ++tap) {
      float* from = data_ + tap * stride_;
      double* to = total_ + tap * channels_;
      for (int64_t c = 0; c < channels_; ++c) to[c] += from[c];
      std::fill_n(from, channels_, 0.f);
    }
    pixels_ = 0;
  }

 private:
  float* data_;
  int64_t taps_, channels_, stride_, pixels_ = 0;
  double* total_;
};

template <class T>
void backward_range(const DepthwiseBackward<T>& work, const Blocks& blocks, int64_t range,
                    const DepthwiseTaps& taps, Ring input_ring, Ring ring, double* total) {
  const DepthwiseShape& s = work.shape;
  const auto& kernels = kernels_for(s);
  const int64_t weights = s.kernel * s.kernel;
  const int64_t input_floats = total ? input_ring.floats() : 0;
  const int64_t sum_floats = total ? weights * ring.pixel() : 0;
  float* memory = scratch(ring.floats() + input_floats + sum_floats + s.width * s.channels);
  float* spare = memory + ring.floats() + input_floats + sum_floats;
  ring.place(memory);
  InputRows<T> input(s, work.input, input_ring);
  std::optional<WeightSums> sums;
  if (total) {
    input_ring.place(memory + ring.floats());
    sums.emplace(memory + ring.floats() + input_floats, weights, s.channels, ring.pixel(), total);
  }
  const int64_t reach = (s.kernel - 1) / s.stride;
  const auto read = [&](int64_t image, int64_t row) {
    const int64_t first = (image * s.oh + row) * s.ow;
    WUS_DISPATCH(activation_kernels<T>())
        .backward_to_floats(work.grad, work.norm, first, first + s.ow, ring.inside(row), nullptr);
  };
  // A block's rows q are those of the gradient, and of the data gradient the rows
  // stride * q - padding + phase that need no later ones.
  blocks.for_range(range, rows_of_image(s), [&](int64_t image, int64_t first, int64_t last) {
    if (work.grad_input) {
      for (int64_t q = std::max<int64_t>(0, first - reach); q < std::min(first, s.oh); ++q) {
        read(image, q);
      }
    }
    input.begin(image, first);
    for (int64_t q = first; q < last; ++q) {
      if (q < s.oh) {
        read(image, q);
        if (sums) {
          kernels.wgrad(input.under(q), ring.inside(q).data, s.channels, s.ow, sums->grow(s.ow),
                        ring.pixel());
        }
      }
      if (!work.grad_input) continue;
      DepthwiseRows rows{};
      rows.pixel = ring.pixel();
      for (int64_t j = 0; j <= reach; ++j) {
        rows.row[j] = q - j >= 0 && q - j < s.oh ? ring.start(q - j) : nullptr;
      }
      for (int64_t phase = 0; phase < s.stride; ++phase) {
        const int64_t row = q * s.stride - s.padding_y + phase;
        if (row < 0 || row >= s.height) continue;
        const int64_t pixel = (image * s.height + row) * s.width;
        T* to = work.grad_input + pixel * s.channels;
        float* product = made_in(to, spare);
        kernels.dgrad(rows, taps, static_cast<int>(phase), s.padding_x, s.channels, s.width,
                      product);
        take(product, s.width, s.channels, to);
      }
    }
  });
  if (sums) sums->flush();
}

}  // namespace

template <class T>
void run_depthwise(const DepthwiseForward<T>& work) {
  run_forward(work, false);
}

template <class T>
at::Tensor run_depthwise_sums(const DepthwiseForward<T>& work) {
  return run_forward(work, true);
}

template <class T>
at::Tensor run_depthwise_backward(const DepthwiseBackward<T>& work) {
  const DepthwiseShape& s = work.shape;
  const int64_t weights = s.kernel * s.kernel;
  const Ring ring = gradient_ring(s), rows = input_ring(s);
  const std::vector<float> weight = transposed(work.weight, weights, s.channels, ring.pixel());
  const DepthwiseTaps taps = {weight.data(), ring.pixel()};
  const Blocks blocks(s.images, rows_of_image(s), work.need_weight ? 32 : 64);
  RangeSums totals(work.need_weight ? blocks.ranges : 0, weights * s.channels);
  if (work.grad_input || work.need_weight) {
    at::parallel_for(0, blocks.ranges, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        backward_range(work, blocks, i, taps, rows, ring, totals.of(i));
      }
    });
  }
  return totals.total();
}

#define WUS_INSTANTIATE(T)                                            \
  template void run_depthwise(const DepthwiseForward<T>&);            \
  template at::Tensor run_depthwise_sums(const DepthwiseForward<T>&); \
  template at::Tensor run_depthwise_backward(const DepthwiseBackward<T>&);
WUS_INSTANTIATE(float)
WUS_INSTANTIATE(Bf16)
#undef WUS_INSTANTIATE

}  // namespace wus::cpu
