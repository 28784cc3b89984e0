// Loops and sums over a tensor's rows.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "common/rows.h"
#include "cpu/simd/element.h"

namespace wus::cpu {

template <class T>
constexpr at::ScalarType kTypeOf = at::kFloat;
template <>
inline constexpr at::ScalarType kTypeOf<Bf16> = at::kBFloat16;

template <class T>
void check_type(const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.device().is_cpu() && t.scalar_type() == kTypeOf<T>, name, " must be a ",
                    kTypeOf<T> == at::kFloat ? "float32" : "bfloat16", " tensor on the CPU, got ",
                    t.scalar_type(), " on ", t.device());
}

// body(an element of the tensor's type)
template <class Body>
auto for_type(const at::Tensor& t, const char* name, const Body& body) {
  TORCH_CHECK_VALUE(
      t.device().is_cpu() && (t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16),
      name, " must be a float32 or bfloat16 tensor on the CPU, got ", t.scalar_type(), " on ",
      t.device());
  return t.scalar_type() == at::kFloat ? body(float{}) : body(Bf16{});
}

inline void check_float(const at::Tensor& t, const char* name) { check_type<float>(t, name); }

// The tensor dense in rows x channels: itself, or a copy.
template <class T = float>
at::Tensor as_rows(const at::Tensor& t, const char* name) {
  check_type<T>(t, name);
  return t.contiguous(row_format(t));
}

inline at::Tensor nothing(const at::Tensor& like, at::ScalarType type = at::kFloat) {
  return at::empty({0}, like.options().dtype(type));
}

// Its elements; null where it is undefined or has none.
template <class T = float>
const T* data(const at::Tensor& t) {
  return t.defined() ? static_cast<const T*>(t.const_data_ptr()) : nullptr;
}
template <class T = float>
T* mutable_data(const at::Tensor& t) {
  return t.defined() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

// Elements worth a thread of their own.
constexpr int64_t kGrain = 32768;

// body(begin, end) over ranges of rows, in parallel.
template <class Body>
void for_rows(int64_t rows, int64_t channels, const Body& body) {
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, channels)), body);
}

// Sums over the rows of each image: body(image, begin, end, sums) adds rows of that image, which
// are counted over all images, to sums[width] of double. Ranges follow from the shape alone and
// their sums are added in order, so that the result does not depend on the number of threads.
// Returns a float64 tensor [images, width].
template <class Body>
at::Tensor sum_over_images(int64_t images, int64_t rows, int64_t channels, int64_t width,
                           const Body& body) {
  constexpr int64_t kMultiple = 64;
  int64_t step = kGrain / std::max<int64_t>(1, channels);
  step = std::max<int64_t>(1, (step + kMultiple - 1) / kMultiple) * kMultiple;
  const int64_t ranges = std::max<int64_t>(1, (rows + step - 1) / step);
  at::Tensor partial = at::zeros({images, ranges, width}, at::kDouble);
  double* sums = partial.data_ptr<double>();
  at::parallel_for(0, images * ranges, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t image = i / ranges, begin = i % ranges * step;
      body(image, image * rows + begin, image * rows + std::min(rows, begin + step),
           sums + i * width);
    }
  });
  for (int64_t image = 0; image < images; ++image) {
    double* total = sums + image * ranges * width;
    for (int64_t i = 1; i < ranges; ++i) {
      for (int64_t c = 0; c < width; ++c) total[c] += total[i * width + c];
    }
  }
  return partial.select(1, 0);
}

// The same over all rows: body(begin, end, sums). Returns a float64 tensor [width].
template <class Body>
at::Tensor sum_over_rows(int64_t rows, int64_t channels, int64_t width, const Body& body) {
  return sum_over_images(
             1, rows, channels, width,
             [&](int64_t, int64_t begin, int64_t end, double* sums) { body(begin, end, sums); })
      .select(0, 0);
}

}  // namespace wus::cpu
