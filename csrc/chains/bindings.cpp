#include "chains/bindings.h"

#include <ATen/ops/stack.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <utility>
#include <vector>

#include "chains/functions.h"
#include "chains/library.h"
#include "chains/python_algorithm.h"

namespace wus::chains {
namespace py = pybind11;
namespace {

Tensor value(const OptionalTensor& tensor) { return tensor.value_or(Tensor()); }

Act act_of(const py::handle& act) {
  Act made{act.attr("kind").cast<int64_t>(), act.attr("slope").cast<double>()};
  const py::object pool = act.attr("pool");
  if (!pool.is_none()) made.pool = pool.cast<std::vector<int64_t>>();
  return made;
}

// A Norm of wus_ext/engine, with the batch's statistics.
std::optional<BatchNorm> norm_of(const py::object& norm) {
  if (norm.is_none()) return std::nullopt;
  const auto tensor = [&](const char* name) {
    const py::object object = norm.attr(name);
    return object.is_none() ? Tensor() : object.cast<Tensor>();
  };
  const Tensor weight = tensor("weight");
  const bool constant = weight.defined() && norm.attr("constant").cast<bool>();
  return BatchNorm{constant ? weight.detach() : weight,
                   tensor("bias"),
                   tensor("running_mean"),
                   tensor("running_var"),
                   norm.attr("momentum").cast<double>(),
                   norm.attr("eps").cast<double>()};
}

Tensor chained_by(const py::object& algorithm, const Tensor& input, const OptionalTensor& bias,
                  const OptionalTensor& trained, const py::object& norm,
                  const OptionalTensor& residual, const py::object& act) {
  const AlgorithmPtr own =
      py::isinstance<Algorithm>(algorithm)
          ? algorithm.cast<AlgorithmPtr>()
          : std::make_shared<PythonAlgorithm>(Kernels::of("wus"), algorithm, act);
  const auto batch_norm = norm_of(norm);
  const Act following = act_of(act);
  py::gil_scoped_release no_gil;
  return chained(own, input, value(bias), value(trained), batch_norm, value(residual), following);
}

Tensor resumed(const Tensor& image, const py::object& norm, const OptionalTensor& residual,
               const py::object& act, const std::string& kernels) {
  const auto batch_norm = norm_of(norm);
  const Act following = act_of(act);
  py::gil_scoped_release no_gil;
  return chained(std::make_shared<Given>(Kernels::of(kernels), image), image, {}, {}, batch_norm,
                 value(residual), following);
}

Tensor rows(const NormGrad& norm) {
  std::vector<Tensor> given{norm.a, norm.b, norm.c};
  if (norm.scale.defined()) given.insert(given.end(), {norm.scale, norm.shift});
  return at::stack(given);
}

}  // namespace

void bind(py::module_& module) {
  auto m = module.def_submodule("chains", "Layers that run as one.");
  py::class_<Trained>(m, "Trained", "What the gradient of a weight is made from.")
      .def(py::init<Tensor, Tensor>())
      .def_readonly("input", &Trained::input)
      .def_readonly("weight", &Trained::weight);
  py::class_<NormGrad>(m, "NormGrad", "The backward of a normalisation of z.")
      .def_readonly("a", &NormGrad::a)
      .def_readonly("b", &NormGrad::b)
      .def_readonly("c", &NormGrad::c)
      .def_readonly("scale", &NormGrad::scale)
      .def_readonly("shift", &NormGrad::shift)
      .def_property_readonly("rows", &rows, "All that is given, [3 or 5, channels].");
  py::class_<Algorithm, AlgorithmPtr>(m, "Algorithm")
      .def_property_readonly("name", &Algorithm::name)
      .def("forward",
           [](Algorithm& self, const Tensor& input, const OptionalTensor& bias,
              const py::object& act) { return self.forward(input, value(bias), act_of(act)); })
      .def("backward", [](Algorithm& self, const Tensor& grad, const OptionalTensor& saved,
                          const py::object& act, bool need_input, bool need_bias,
                          const std::optional<Trained>& trained) {
        auto [input, bias, weight] = self.backward(grad, value(saved), act_of(act), need_input,
                                                   need_bias, trained.value_or(Trained{}));
        return std::make_tuple(input, bias, weight);
      });
  py::class_<Library, LibraryPtr>(m, "Library", "The library's own layer, of given numbers.")
      .def_property_readonly("name", &Library::name)
      .def("takes", &Library::takes, "Whether a weight is as the library wants it.")
      .def("cast", &Library::cast, "A weight as the library wants it.")
      .def("on", &Library::on, "The layer on a weight that it takes.");
  py::class_<Convolution, Library, std::shared_ptr<Convolution>>(m, "Convolution")
      .def(py::init([](Size kernel_size, Size stride, Size padding, Size dilation, int64_t groups,
                       Size input_size, Size output_size, bool gpu, const std::string& kernels) {
        return std::make_shared<Convolution>(Window{kernel_size, stride, padding, dilation}, groups,
                                             input_size, output_size, gpu, Kernels::of(kernels));
      }));
  py::class_<Linear, Library, std::shared_ptr<Linear>>(m, "Linear")
      .def(py::init([](const std::string& kernels) {
        return std::make_shared<Linear>(Kernels::of(kernels));
      }));
  m.def("chained", &chained_by);
  m.def("resumed", &resumed);
  m.def("entered", &entered);
}

}  // namespace wus::chains
