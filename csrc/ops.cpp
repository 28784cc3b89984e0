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

  // Element-wise kernels of a skip step. mask: uint8 [rows, ceil(C / 8)], a bit an element; code:
  // uint8 [N, H / 2, W / 2, C], a byte a 2x2 window (see cpu/mask_kernels.h, cpu/pool_kernels.h).
  m.def("relu_mask(Tensor input) -> (Tensor output, Tensor mask)");
  m.def("relu_mask_(Tensor(a!) input) -> (Tensor(a!) output, Tensor mask)");
  m.def("add_relu_mask(Tensor input, Tensor other) -> (Tensor output, Tensor mask)");
  m.def(
      "mask_bias_grad(Tensor grad_output, Tensor? mask=None, bool need_grad_input=True) -> "
      "(Tensor grad_input, Tensor grad_bias)");

  m.def("relu_max_pool(Tensor input, bool relu=True) -> (Tensor output, Tensor code)");
  m.def(
      "max_pool_bias_grad(Tensor grad_output, Tensor code, SymInt[2] input_size, "
      "bool need_grad_input=True) -> (Tensor grad_input, Tensor grad_bias)");

  m.def(
      "dropout_mask(Tensor input, float p=0.5, Generator? generator=None) -> "
      "(Tensor output, Tensor mask)");
  m.def(
      "relu_dropout_mask(Tensor input, float p=0.5, Generator? generator=None) -> "
      "(Tensor output, Tensor mask)");
  m.def("apply_mask(Tensor grad_output, Tensor mask, float scale=1) -> Tensor");

  // Batch norm in training mode. act: 0 none, 1 ReLU with a mask, 2 ReLU and 2x2 max-pool with
  // codes, 3 ReLU whose mask backward computes again from the input (see cpu/batch_norm_kernels.h).
  m.def("batch_norm_stats(Tensor input) -> (Tensor mean, Tensor var)");
  m.def(
      "batch_norm_scale_shift(Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps) -> "
      "(Tensor scale, Tensor shift, Tensor invstd)");
  m.def(
      "batch_norm_update_running(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, "
      "Tensor var, float momentum, SymInt count) -> ()");
  m.def(
      "batch_norm_apply(Tensor input, Tensor scale, Tensor shift, Tensor? residual=None, int "
      "act=0) "
      "-> (Tensor output, Tensor mask)");
  m.def(
      "batch_norm_grad_sums(Tensor grad_output, Tensor input, Tensor mean, Tensor? mask=None, "
      "Tensor? scale=None, Tensor? shift=None, int act=0) -> (Tensor sum_grad, Tensor "
      "sum_grad_xmu)");
  m.def(
      "batch_norm_grad_coefficients(Tensor sum_grad, Tensor sum_grad_xmu, Tensor mean, "
      "Tensor invstd, Tensor? weight, SymInt count) -> "
      "(Tensor a, Tensor b, Tensor c0, Tensor grad_bias, Tensor grad_weight)");
  m.def(
      "batch_norm_grad_input(Tensor grad_output, Tensor input, Tensor a, Tensor b, Tensor c0, "
      "Tensor? mask=None, Tensor? scale=None, Tensor? shift=None, int act=0, "
      "bool need_grad_residual=False) -> (Tensor grad_input, Tensor grad_residual)");
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
