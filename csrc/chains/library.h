#pragma once
// The library's own convolution: oneDNN's, cuDNN's.
#include "chains/algorithm.h"

namespace wus::chains {

// A convolution's numbers, and where it runs.
struct Library {
  Size kernel_size, stride, padding, dilation;
  int64_t groups;
  Size input_size, output_size;
  // On a GPU the bias is not cuDNN's: one pass of ours adds it and all that follows. It may be
  // float32 behind a convolution in low precision, so that it is never cast.
  bool gpu;
  const Kernels& kernels;

  // For people.
  const char* name() const { return gpu ? "cuDNN" : "oneDNN"; }
  // The weight as the library wants it: of the input's type, in channels_last, unless it is
  // float32 on the CPU; undefined where that takes a copy.
  Tensor as_it_is(const Tensor& weight, at::ScalarType dtype) const;
  Tensor cast(const Tensor& weight, at::ScalarType dtype) const;
  // conv(input) + bias and no more, with torch's own backward, or without a weight gradient.
  //
  // trained: the weight, where it gets a gradient.
  Tensor alone(const Tensor& input, const Tensor& weight, const Tensor& bias,
               const Tensor& trained) const;
};

using LibraryPtr = std::shared_ptr<Library>;

class LibraryConvolution final : public Unfused {
 public:
  LibraryConvolution(LibraryPtr library, Tensor weight);

  Output forward(const Tensor& input, const Tensor& bias, const Act& act) override;
  Output forward_add(const Tensor& input, const Tensor& bias, const Tensor& residual,
                     const Act& act) override;
  Normed forward_norm(const Tensor& input, const Tensor& bias, const BatchNorm& norm) override;
  Tensor dgrad(const Tensor& grad) override;
  Tensor wgrad(const Tensor& grad, const Trained& trained) override;
  OptionalTensor alone(const Tensor& input, const Tensor& bias, const Tensor& trained) override {
    return library_->alone(input, weight_, bias, trained);
  }

  const Library& library() const { return *library_; }
  // Throws if it is not what it was in the forward pass.
  const Tensor& weight() const;

 protected:
  Tensor convolve(const Tensor& input, const Tensor& bias) override;

 private:
  Output shifted(const Tensor& output, const Tensor& bias, const OptionalTensor& residual,
                 const Act& act) const;

  LibraryPtr library_;
  Tensor weight_;
  std::optional<uint32_t> version_;
};

}  // namespace wus::chains
