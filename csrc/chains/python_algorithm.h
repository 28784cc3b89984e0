#pragma once
// An algorithm of wus_ext/engine/conv, as chains call it.
#include <pybind11/pybind11.h>

#include "chains/algorithm.h"

namespace wus::chains {

class PythonAlgorithm final : public Algorithm {
 public:
  // act: the chain's, as Python has it.
  PythonAlgorithm(const Kernels& kernels, pybind11::object algorithm, pybind11::object act);
  ~PythonAlgorithm() override;

  const char* name() const override { return "in Python"; }

  Output forward(const Tensor& input, const Tensor& bias, const Act& act) override;
  Output forward_add(const Tensor& input, const Tensor& bias, const Tensor& residual,
                     const Act& act) override;
  Normed forward_norm(const Tensor& input, const Tensor& bias, const BatchNorm& norm) override;
  Gradients backward(const Tensor& grad, const Tensor& saved, const Act& act, bool need_input,
                     bool need_bias, const Trained& trained) override;
  Tensor dgrad(const Tensor& grad) override;
  Tensor wgrad(const Tensor& grad, const Trained& trained) override;
  std::tuple<Tensor, Tensor, Tensor> backward_norm(const Tensor& grad, const Tensor& z,
                                                   const NormGrad& norm, const Tensor& mask,
                                                   const Act& act, bool need_input,
                                                   bool need_residual,
                                                   const Trained& trained) override;

 private:
  pybind11::object algorithm_, act_;
};

}  // namespace wus::chains
