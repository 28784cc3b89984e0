#pragma once
// The library's own layers: oneDNN's, cuDNN's, torch's.
#include <memory>

#include "chains/algorithm.h"

namespace wus::chains {

// A layer of given numbers, for any weight.
class Library : public std::enable_shared_from_this<Library> {
 public:
  virtual ~Library() = default;

  // For people.
  virtual const char* name() const = 0;
  // Whether the weight is what the library wants for inputs of a type.
  virtual bool takes(const Tensor& weight, at::ScalarType dtype) const = 0;
  // The weight as the library wants it.
  virtual Tensor cast(const Tensor& weight, at::ScalarType dtype) const = 0;
  // On a weight that it takes.
  virtual AlgorithmPtr on(Tensor weight) const = 0;
  // The layer and no more, with torch's own backward, or without a weight gradient.
  //
  // trained: the weight, where it gets a gradient, and `weight` is not read.
  virtual Tensor alone(const Tensor& input, const Tensor& weight, const Tensor& bias,
                       const Tensor& trained) const = 0;
};

using LibraryPtr = std::shared_ptr<Library>;

// A weight that backward must find as forward left it.
class Unchanged {
 public:
  explicit Unchanged(Tensor weight);

  // Throws if it has changed.
  const Tensor& get() const;
  const Tensor& unchecked() const { return weight_; }

 private:
  Tensor weight_;
  std::optional<uint32_t> version_;
};

// A bias in the type of the layer's input.
OptionalTensor as(at::ScalarType dtype, const Tensor& bias);

struct Window {
  Size kernel_size, stride, padding, dilation;
};

// cuDNN's convolution on a GPU, oneDNN's on the CPU.
class Convolution final : public Library {
 public:
  Convolution(const Window& window, int64_t groups, const Size& input_size, const Size& output_size,
              bool gpu, const Kernels& kernels)
      : window(window),
        groups(groups),
        input_size(input_size),
        output_size(output_size),
        gpu(gpu),
        kernels(kernels) {}

  const char* name() const override { return gpu ? "cuDNN" : "oneDNN"; }
  // Of the input's type and in channels_last; float32 on the CPU may be in any layout.
  bool takes(const Tensor& weight, at::ScalarType dtype) const override;
  Tensor cast(const Tensor& weight, at::ScalarType dtype) const override;
  AlgorithmPtr on(Tensor weight) const override;
  Tensor alone(const Tensor& input, const Tensor& weight, const Tensor& bias,
               const Tensor& trained) const override;

  const Window window;
  const int64_t groups;
  const Size input_size, output_size;
  const bool gpu;
  const Kernels& kernels;
};

// torch's products.
class Linear final : public Library {
 public:
  explicit Linear(const Kernels& kernels) : kernels(kernels) {}

  const char* name() const override { return "torch"; }
  bool takes(const Tensor& weight, at::ScalarType dtype) const override {
    return weight.scalar_type() == dtype;
  }
  Tensor cast(const Tensor& weight, at::ScalarType dtype) const override {
    return weight.to(dtype);
  }
  AlgorithmPtr on(Tensor weight) const override;
  Tensor alone(const Tensor& input, const Tensor& weight, const Tensor& bias,
               const Tensor& trained) const override;

  const Kernels& kernels;
};

}  // namespace wus::chains
