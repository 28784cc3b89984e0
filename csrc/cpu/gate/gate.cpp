// Maps times one number a channel of each image, the gate of squeeze-and-excitation (Hu et al.,
// arXiv 1709.01507): both gradients in one pass.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/gate/kernels.h"
#include "cpu/parallel_rows.h"

namespace wus::cpu {
namespace {

// Images cut into ranges of rows, which follow from the shape alone.
struct Ranges {
  int64_t images, rows, channels, step, per_image, count;

  explicit Ranges(const at::Tensor& image)
      : images(image.size(0)),
        rows(image.size(2) * image.size(3)),
        channels(image.size(1)),
        step(std::max<int64_t>(kLeast, kGrain / std::max<int64_t>(1, channels))),
        per_image((rows + step - 1) / step),
        count(images * per_image) {}

  // body(range, image, first row of all, rows), in parallel.
  template <class Body>
  void for_each(const Body& body) const {
    const int64_t least = kGrain / std::max<int64_t>(1, std::min(step, rows) * channels);
    at::parallel_for(0, count, std::max<int64_t>(1, least), [&](int64_t begin, int64_t end) {
      for (int64_t range = begin; range < end; ++range) {
        const int64_t image = range / per_image, first = range % per_image * step;
        body(range, image, image * rows + first, std::min(step, rows - first));
      }
    });
  }

  // Sums of ranges [count, channels], added to those of their images [images, channels], in order.
  at::Tensor added(const at::Tensor& sums) const {
    if (per_image == 1) return sums;
    at::Tensor total = at::zeros({images, channels}, at::kDouble);
    for (int64_t i = 0; i < per_image; ++i)
      total += sums.view({images, per_image, channels}).select(1, i);
    return total;
  }

 private:
  static constexpr int64_t kLeast = 64;
};

void check_gate(const at::Tensor& image, const at::Tensor& gate) {
  TORCH_CHECK_VALUE(image.dim() == 4, "grad_output must be [N, C, H, W], got size ", image.sizes());
  const std::vector<int64_t> sizes = {image.size(0), image.size(1), 1, 1};
  const at::IntArrayRef one(sizes);
  TORCH_CHECK_VALUE(gate.sizes() == one, "gate must be of size ", one, " for an image of size ",
                    image.sizes(), ", got ", gate.sizes());
}

std::tuple<at::Tensor, at::Tensor> gate_grad(const at::Tensor& grad_output,
                                             const std::optional<at::Tensor>& input,
                                             const at::Tensor& gate, bool need_grad_input) {
  return for_type(grad_output, "grad_output", [&](auto element) {
    using T = decltype(element);
    check_gate(grad_output, gate);
    if (input) check_same_size(grad_output, "grad_output", *input, "input");
    const at::Tensor grad = as_rows<T>(grad_output, "grad_output");
    const at::Tensor x = input ? as_rows<T>(*input, "input") : at::Tensor();
    const at::Tensor s = as_rows<T>(gate, "gate");
    at::Tensor grad_input = need_grad_input ? empty_rows(grad) : nothing(grad, kTypeOf<T>);
    const Ranges ranges(grad);
    const int64_t channels = ranges.channels;
    at::Tensor partial = at::zeros({input ? ranges.count : 0, channels}, at::kDouble);
    const T *g = data<T>(grad), *in = data<T>(x), *factor = data<T>(s);
    T* out = need_grad_input ? mutable_data<T>(grad_input) : nullptr;
    double* sums = input ? partial.mutable_data_ptr<double>() : nullptr;
    if (need_grad_input || input) {
      ranges.for_each([&](int64_t range, int64_t image, int64_t first, int64_t rows) {
        const int64_t i = first * channels;
        WUS_DISPATCH(gate_kernels<T>())
            .backward(g + i, in == nullptr ? nullptr : in + i, factor + image * channels, rows,
                      channels, out == nullptr ? nullptr : out + i,
                      sums == nullptr ? nullptr : sums + range * channels);
      });
    }
    if (!input) return std::make_tuple(grad_input, nothing(grad, kTypeOf<T>));
    return std::make_tuple(grad_input, ranges.added(partial).to(s.scalar_type()).view_as(s));
  });
}

TORCH_LIBRARY_IMPL(wus, CPU, m) { m.impl("gate_grad", &gate_grad); }

}  // namespace
}  // namespace wus::cpu
