#include "chains/python_algorithm.h"

#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <utility>

namespace wus::chains {
namespace py = pybind11;
namespace {

// None stands for an undefined tensor, in both directions.
Tensor tensor(const py::handle& object) {
  return object.is_none() ? Tensor() : object.cast<Tensor>();
}

template <class Result>
Result two(const py::tuple& both) {
  return {tensor(both[0]), tensor(both[1])};
}

py::object given(const Trained& trained) { return trained ? py::cast(trained) : py::none(); }

template <class Result>
Result three(const py::tuple& all) {
  return {tensor(all[0]), tensor(all[1]), tensor(all[2])};
}

}  // namespace

PythonAlgorithm::PythonAlgorithm(const Kernels& kernels, py::object algorithm, py::object act)
    : Algorithm(kernels), algorithm_(std::move(algorithm)), act_(std::move(act)) {}

PythonAlgorithm::~PythonAlgorithm() {
  if (!Py_IsInitialized()) {  // a graph that outlives the interpreter
    algorithm_.release();
    act_.release();
    return;
  }
  py::gil_scoped_acquire gil;
  algorithm_ = act_ = py::object();
}

Output PythonAlgorithm::forward(const Tensor& input, const Tensor& bias, const Act&) {
  py::gil_scoped_acquire gil;
  return two<Output>(algorithm_.attr("forward")(input, bias, act_));
}

Output PythonAlgorithm::forward_add(const Tensor& input, const Tensor& bias, const Tensor& residual,
                                    const Act&) {
  py::gil_scoped_acquire gil;
  return two<Output>(algorithm_.attr("forward_add")(input, bias, residual, act_));
}

Normed PythonAlgorithm::forward_norm(const Tensor& input, const Tensor& bias,
                                     const BatchNorm& norm) {
  Tensor z, mean, var;
  {
    py::gil_scoped_acquire gil;
    std::tie(z, mean, var) =
        three<std::tuple<Tensor, Tensor, Tensor>>(algorithm_.attr("forward_stats")(input, bias));
  }
  return normed(kernels, z, mean, var, norm);
}

Gradients PythonAlgorithm::backward(const Tensor& grad, const Tensor& saved, const Act&,
                                    bool need_input, bool need_bias, const Trained& trained) {
  py::gil_scoped_acquire gil;
  return three<Gradients>(
      algorithm_.attr("backward")(grad, saved, act_, need_input, need_bias, given(trained)));
}

Tensor PythonAlgorithm::dgrad(const Tensor& grad) {
  py::gil_scoped_acquire gil;
  return tensor(algorithm_.attr("dgrad")(grad));
}

Tensor PythonAlgorithm::wgrad(const Tensor& grad, const Trained& trained) {
  py::gil_scoped_acquire gil;
  return tensor(algorithm_.attr("wgrad")(grad, given(trained)));
}

std::tuple<Tensor, Tensor, Tensor> PythonAlgorithm::backward_norm(
    const Tensor& grad, const Tensor& z, const NormGrad& norm, const Tensor& mask, const Act&,
    bool need_input, bool need_residual, const Trained& trained) {
  py::gil_scoped_acquire gil;
  return three<std::tuple<Tensor, Tensor, Tensor>>(algorithm_.attr("backward_norm")(
      grad, z, norm, mask, act_, need_input, need_residual, given(trained)));
}

}  // namespace wus::chains
