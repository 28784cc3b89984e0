// Maps times one number a channel of each image, the gate of squeeze-and-excitation (Hu et al.,
// arXiv 1709.01507): both gradients in one pass.
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/gate/kernels.h"
#include "cpu/parallel_rows.h"

namespace wus::cpu {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

void check_gate(const at::Tensor& gate, at::IntArrayRef sizes, const at::Tensor& image) {
  TORCH_CHECK_VALUE(gate.sizes() == sizes, "gate must be of size ", sizes, " for an image of size ",
                    image.sizes(), ", got ", gate.sizes());
}

std::tuple<at::Tensor, at::Tensor> gate_grad(const at::Tensor& grad_output,
                                             const OptionalTensor& input,
                                             const OptionalTensor& gate) {
  return for_type(grad_output, "grad_output", [&](auto element) {
    using T = decltype(element);
    TORCH_CHECK_VALUE(grad_output.dim() == 4, "grad_output must be [N, C, H, W], got size ",
                      grad_output.sizes());
    const int64_t images = grad_output.size(0), channels = grad_output.size(1);
    const std::vector<int64_t> one = {images, channels, 1, 1};
    if (input) check_same_size(grad_output, "grad_output", *input, "input");
    if (gate) check_gate(*gate, one, grad_output);
    const at::Tensor grad = as_rows<T>(grad_output, "grad_output");
    const at::Tensor x = input ? as_rows<T>(*input, "input") : at::Tensor();
    const at::Tensor factor = gate ? as_rows<T>(*gate, "gate") : at::Tensor();
    at::Tensor grad_input = gate ? empty_rows(grad) : nothing(grad, kTypeOf<T>);
    const T *g = data<T>(grad), *in = data<T>(x), *s = data<T>(factor);
    T* out = gate ? mutable_data<T>(grad_input) : nullptr;
    const int64_t rows = grad.size(2) * grad.size(3);
    const at::Tensor sums =
        sum_over_images(images, rows, channels, /*width=*/channels,
                        [&](int64_t image, int64_t begin, int64_t end, double* sums) {
                          const int64_t i = begin * channels;
                          WUS_DISPATCH(gate_kernels<T>())
                              .backward(g + i, in == nullptr ? nullptr : in + i,
                                        s == nullptr ? nullptr : s + image * channels, end - begin,
                                        channels, out == nullptr ? nullptr : out + i, sums);
                        });
    if (!input) return std::make_tuple(grad_input, nothing(grad, kTypeOf<T>));
    return std::make_tuple(grad_input, sums.to(grad.scalar_type()).view(one));
  });
}

TORCH_LIBRARY_IMPL(wus, CPU, m) { m.impl("gate_grad", &gate_grad); }

}  // namespace
}  // namespace wus::cpu
