// Every operator's schema, and the Python module with what the build knows of itself.
// Kernels register themselves beside their code: autograd/, cpu/, cuda/.
#include <ATen/Version.h>
#include <torch/extension.h>
#include <torch/library.h>

#include "cpu/dispatch.h"

TORCH_LIBRARY(wus, m) {
  m.def(
      "conv2d(Tensor input, Tensor weight, Tensor? bias=None, SymInt[2] stride=1, "
      "SymInt[2] padding=0, SymInt[2] dilation=1, SymInt groups=1, *, bool skip_wgrad=False) -> "
      "Tensor");
  m.def(
      "linear(Tensor input, Tensor weight, Tensor? bias=None, *, bool skip_wgrad=False) -> Tensor");
}

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
#ifdef WUS_WITH_CUDA
  info["cuda"] = WUS_CUDA_VERSION;
  info["cuda_archs"] = WUS_CUDA_ARCHS;
#else
  info["cuda"] = pybind11::none();
  info["cuda_archs"] = pybind11::none();
#endif
  info["cpu_capability"] = wus::cpu::isa_name();
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The compiled half of wus_ext; importing it registers torch.ops.wus.";
  m.def("build_info", &build_info);
}
