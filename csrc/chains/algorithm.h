#pragma once
// A layer on given weights, and what surrounds it in a chain: forward, data gradient, weight
// gradient. Of one call: backward finds it as forward left it. Images are in channels_last. "conv"
// stands for a linear layer as well, behind which there is no normalisation, sum or pool.
#include <memory>
#include <string>
#include <tuple>

#include "chains/act.h"
#include "chains/norm.h"

namespace wus::chains {

// What the gradient of a weight is made from, besides the output's; undefined: there is none.
struct Trained {
  Tensor input, weight;

  explicit operator bool() const { return input.defined(); }
};

// The backward of a normalisation of z: a * g + b * z + c for each channel; scale and shift are the
// forward's, where backward is to compute an activation's input from z.
struct NormGrad {
  Tensor a, b, c, scale, shift;
};

// Undefined where not wanted.
struct Gradients {
  Tensor input, bias, weight;
};

class Algorithm {
 public:
  explicit Algorithm(const Kernels& kernels) : kernels(kernels) {}
  virtual ~Algorithm() = default;

  // For people.
  virtual const char* name() const = 0;
  // act(conv(input) + bias), and what backward needs.
  virtual Output forward(const Tensor& input, const Tensor& bias, const Act& act) = 0;
  // act(conv(input) + bias + residual); the activation is none or one that saves bits.
  virtual Output forward_add(const Tensor& input, const Tensor& bias, const Tensor& residual,
                             const Act& act) = 0;
  // conv(input) + bias, and what normalises it.
  virtual Normed forward_norm(const Tensor& input, const Tensor& bias, const BatchNorm& norm) = 0;
  virtual Gradients backward(const Tensor& grad, const Tensor& saved, const Act& act,
                             bool need_input, bool need_bias, const Trained& trained) = 0;
  virtual Tensor dgrad(const Tensor& grad) = 0;
  virtual Tensor wgrad(const Tensor& grad, const Trained& trained) = 0;
  // Gradients of the input, of what was added before act, and of the weight, through an activation
  // and a normalisation of z.
  virtual std::tuple<Tensor, Tensor, Tensor> backward_norm(const Tensor& grad, const Tensor& z,
                                                           const NormGrad& norm, const Tensor& mask,
                                                           const Act& act, bool need_input,
                                                           bool need_residual,
                                                           const Trained& trained) = 0;
  // conv(input) + bias as one of torch's own functions, where it is one; trained: as for chained.
  virtual OptionalTensor alone(const Tensor& input, const Tensor& bias, const Tensor& trained) {
    return std::nullopt;
  }

  const Kernels& kernels;
};

using AlgorithmPtr = std::shared_ptr<Algorithm>;

// A layer and element-wise kernels behind it; subclasses give the layer.
class Unfused : public Algorithm {
 public:
  Unfused(const Kernels& kernels, const Size& output_size)
      : Algorithm(kernels), output_size_(output_size) {}

  Output forward(const Tensor& input, const Tensor& bias, const Act& act) override;
  Output forward_add(const Tensor& input, const Tensor& bias, const Tensor& residual,
                     const Act& act) override;
  Normed forward_norm(const Tensor& input, const Tensor& bias, const BatchNorm& norm) override;
  Gradients backward(const Tensor& grad, const Tensor& saved, const Act& act, bool need_input,
                     bool need_bias, const Trained& trained) override;
  std::tuple<Tensor, Tensor, Tensor> backward_norm(const Tensor& grad, const Tensor& z,
                                                   const NormGrad& norm, const Tensor& mask,
                                                   const Act& act, bool need_input,
                                                   bool need_residual,
                                                   const Trained& trained) override;

 protected:
  virtual Tensor convolve(const Tensor& input, const Tensor& bias) = 0;

 private:
  Size output_size_;
};

// The output of a convolution that has run already, because somebody else holds it, too.
class Given final : public Unfused {
 public:
  Given(const Kernels& kernels, const Tensor& image)
      : Unfused(kernels, {image.size(2), image.size(3)}) {}

  const char* name() const override { return "given"; }
  Output forward(const Tensor& input, const Tensor& bias, const Act& act) override;
  Output forward_add(const Tensor& input, const Tensor& bias, const Tensor& residual,
                     const Act& act) override;
  Tensor dgrad(const Tensor& grad) override { return grad; }
  Tensor wgrad(const Tensor& grad, const Trained& trained) override;

 protected:
  Tensor convolve(const Tensor& input, const Tensor& bias) override { return input; }
};

}  // namespace wus::chains
