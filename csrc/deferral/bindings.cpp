#include "deferral/bindings.h"

#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "deferral/append.h"
#include "deferral/deferred.h"
#include "deferral/session.h"
#include "deferral/signature.h"

namespace wus::deferral {
namespace py = pybind11;

void bind(py::module_& module) {
  auto m =
      module.def_submodule("deferral", "Layers' calls that are computed when they are needed.");
  py::class_<Session, std::shared_ptr<Session>>(m, "Session")
      .def(py::init<py::object, bool>())
      .def("begin", &Session::begin)
      .def("finish", &Session::finish)
      .def("abandon", &Session::abandon);
  m.def("engine", []() -> py::object {
    const Session* session = Session::current();
    return session == nullptr ? py::none() : session->engine();
  });
  m.def("settle_all", []() {
    if (Session* session = Session::current()) session->settle_all();
  });
  // Unlike is_contiguous this tells layouts apart where dimensions of size 1 leave both open.
  m.def("suggests_channels_last", [](const at::Tensor& tensor) {
    return tensor.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  });
  m.def("signature", &signature,
        "What a plan depends on of a layer's tensors: types, devices, sizes, autocast.");
  m.def("begin_chain", &begin_chain);
  m.def("append_norm",
        [](const at::Tensor& input, std::optional<at::Tensor> weight,
           std::optional<at::Tensor> bias, std::optional<at::Tensor> running_mean,
           std::optional<at::Tensor> running_var, std::optional<at::Tensor> batches, bool counts,
           bool constant, bool batch, double momentum, double eps, const py::object& layer) {
          return append_norm(input, {std::move(weight), std::move(bias), std::move(running_mean),
                                     std::move(running_var), std::move(batches), counts, constant,
                                     batch, momentum, eps, layer.is_none() ? py::object() : layer});
        });
  m.def("is_deferred", [](const at::Tensor& tensor) { return as_deferred(tensor) != nullptr; });
  m.def("settle", [](const at::Tensor& tensor) {
    if (Deferred* deferred = as_deferred(tensor)) deferred->settle();
    return tensor;
  });
}

}  // namespace wus::deferral
