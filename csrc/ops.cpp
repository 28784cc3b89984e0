// Every operator's schema, and the Python module with what the build knows of itself.
// Kernels register themselves beside their code: autograd/, cpu/, cuda/.
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include "build_config.h"
#include "chains/bindings.h"
#include "cpu/simd/dispatch.h"
#include "deferral/bindings.h"

TORCH_LIBRARY(wus, m) {
  // Over a constant weight, which gets no gradient.
  m.def(
      "convolution(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups) -> Tensor");
  m.def("linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor");

  // Element-wise kernels of a skip step. mask: uint8 [rows, ceil(C / 8)], a bit an element; code:
  // uint8 [N, H', W', C], a byte a pooled element (see common/layout.h).
  //
  // Activations (see common/activation.h for act; slope: a leaky ReLU's). mask: bits for act 1 to
  // 4, else uint8 [0]; the others' backward wants the activation's input. other is added before,
  // for act 0 to 4. grad_input: [0] for act 0, whose gradient is grad_output; grad_bias: float32.
  m.def(
      "activate(Tensor input, Tensor? other=None, int act=1, float slope=0) -> "
      "(Tensor output, Tensor mask)");
  m.def(
      "activate_(Tensor(a!) input, int act=1, float slope=0) -> (Tensor(a!) output, Tensor mask)");
  m.def(
      "activate_grad(Tensor grad_output, Tensor? mask=None, Tensor? input=None, int act=1, "
      "float slope=0, bool need_grad_input=True, bool need_grad_bias=True) -> "
      "(Tensor grad_input, Tensor grad_bias)");

  // pool: kernel, stride, padding, and 1 for ceil_mode; square. grad_bias: float32 [C].
  m.def(
      "relu_max_pool(Tensor input, bool relu=True, int[] pool=[2, 2, 0, 0]) -> "
      "(Tensor output, Tensor code)");
  m.def(
      "max_pool_bias_grad(Tensor grad_output, Tensor code, SymInt[2] input_size, "
      "bool need_grad_input=True, int[] pool=[2, 2, 0, 0]) -> "
      "(Tensor grad_input, Tensor grad_bias)");

  // Backward of images times a gate [N, C, 1, 1], on the CPU. grad_input where gate is given,
  // grad_gate where input is; else [0].
  m.def(
      "gate_grad(Tensor grad_output, Tensor? input=None, Tensor? gate=None) -> "
      "(Tensor grad_input, Tensor grad_gate)");

  m.def(
      "dropout_mask(Tensor input, float p=0.5, Generator? generator=None) -> "
      "(Tensor output, Tensor mask)");
  m.def(
      "relu_dropout_mask(Tensor input, float p=0.5, Generator? generator=None, *, "
      "Tensor? noise=None) -> (Tensor output, Tensor mask)");
  m.def("apply_mask(Tensor grad_output, Tensor mask, float scale=1) -> Tensor");

  // Batch norm in training mode, with what follows it: an activation, or none or ReLU and a
  // max-pool. mask: bits for act 1 to 4 if wanted, codes for a pool. Without a mask, backward
  // computes the activation's input again from scale and shift. Without a scale, batch_norm_apply
  // adds the shift alone: a bias.
  m.def("batch_norm_stats(Tensor input) -> (Tensor mean, Tensor var)");
  m.def(
      "batch_norm_scale_shift(Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps) -> "
      "(Tensor scale, Tensor shift, Tensor invstd)");
  m.def(
      "batch_norm_update_running(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, "
      "Tensor var, float momentum, SymInt count) -> ()");
  // Statistics, what they make of weight and bias, and the running ones' update, in one.
  // offset: what input is short of: a bias, of which running_mean alone, and NaN, must hear.
  m.def(
      "batch_norm_train(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, float momentum, float eps, Tensor? offset=None) -> "
      "(Tensor mean, Tensor scale, Tensor shift, Tensor invstd)");
  m.def(
      "batch_norm_apply(Tensor input, Tensor? scale, Tensor shift, Tensor? residual=None, "
      "int act=0, float slope=0, int[] pool=[], bool need_mask=True) -> "
      "(Tensor output, Tensor mask)");
  m.def(
      "batch_norm_grad_coefficients(Tensor grad_output, Tensor input, Tensor mean, Tensor invstd, "
      "Tensor? weight=None, Tensor? mask=None, Tensor? scale=None, Tensor? shift=None, int act=0, "
      "float slope=0, int[] pool=[]) -> "
      "(Tensor a, Tensor b, Tensor c0, Tensor grad_bias, Tensor grad_weight)");
  m.def(
      "batch_norm_grad_input(Tensor grad_output, Tensor input, Tensor a, Tensor b, Tensor c0, "
      "Tensor? mask=None, Tensor? scale=None, Tensor? shift=None, int act=0, float slope=0, "
      "int[] pool=[], bool need_grad_residual=False) -> "
      "(Tensor grad_input, Tensor grad_residual)");
  // Winograd convolution on the CPU (3x3, stride 1, dilation 1, one group; float32, channels_last).
  // scheme: 4 = F(4x4, 3x3), 2 = F(2x2, 3x3), 0 = maps of at most 2x2 pixels with padding 1.
  //
  // weight [K, C, 3, 3], any strides -> float32 [36 | 16 | 9, *], good for this process only.
  m.def("winograd_pack(Tensor weight, bool dgrad, int scheme) -> Tensor");
  // Packs a weight where another of its shape was packed.
  m.def("winograd_pack_(Tensor(a!) packed, Tensor weight, bool dgrad, int scheme) -> Tensor(a!)");
  // input [N, C, H, W]; H' = H + 2 * padding - 2, W' likewise; output channels_last.
  // epilogue 0: -> [N, K, H', W'], uint8 [0]
  //   1, ReLU: -> [N, K, H', W'], bit mask uint8 [N, H', W', ceil(K / 8)]
  //   2, ReLU and 2x2 max-pooling: -> [N, K, H' / 2, W' / 2], codes uint8 [N, H' / 2, W' / 2, K]:
  //      2 * dy + dx of the maximum, or 4 where it is not positive
  //   3, statistics: -> [N, K, H', W'], mean and biased variance float32 [2, K]
  m.def(
      "winograd_forward(Tensor input, Tensor packed, Tensor? bias, SymInt out_channels, "
      "int padding, int scheme, int epilogue) -> (Tensor, Tensor)");
  // -> grad_input [N, in_channels, *input_size], channels_last, and grad_bias [K] or [0].
  // prologue 0: grad_output [N, K, H', W'] as it is, no grad_bias
  //   1: with grad_bias; 2: behind a bit mask; 3: [N, K, H' / 2, W' / 2] behind pool codes
  //   4 to 6, batch norm, no grad_bias: a * g + b * z + c with z [N, K, H', W'] and batch_norm
  //      [3, K] = a, b, c, where g is grad_output (4), behind a bit mask (5), behind pool codes (6)
  m.def(
      "winograd_dgrad(Tensor grad_output, Tensor packed, Tensor? mask, SymInt in_channels, "
      "SymInt[2] input_size, int padding, int scheme, int prologue, Tensor? z=None, "
      "Tensor? batch_norm=None) -> (Tensor, Tensor)");
  // -> the weight's gradient [K, C, 3, 3], channels_last or contiguous; input [N, C, H, W];
  // grad_output, prologue and what belongs to it as in winograd_dgrad.
  m.def(
      "winograd_wgrad(Tensor grad_output, Tensor input, Tensor? mask, int padding, int scheme, "
      "int prologue, Tensor? z=None, Tensor? batch_norm=None, bool channels_last=True) -> Tensor");

  // Products of a linear layer on the CPU, float32 (see cpu/linear.cpp): input [N, in_features],
  // weight [out_features, in_features], grad_output [N, out_features].
  m.def("linear_forward(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def("linear_dgrad(Tensor grad_output, Tensor weight) -> Tensor");
  // Depthwise convolution on the CPU (groups == inputs == outputs; 3x3 or 5x5, stride 1 or 2 in
  // both directions, dilation 1; channels_last). Maps are float32 or bfloat16, all else float32.
  //
  // input [N, C, H, W], weight [C, 1, k, k] -> act(conv + bias) [N, C, H', W']; saved: what
  // backward needs, bits uint8 [N * H' * W', ceil(C / 8)] for act 1 to 4, the act's input for
  // others, or [0].
  m.def(
      "depthwise_forward(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, "
      "SymInt[2] padding, int act=0, float slope=0) -> (Tensor output, Tensor saved)");
  // -> conv + bias, and each channel's mean and biased variance.
  m.def(
      "depthwise_forward_stats(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, "
      "SymInt[2] padding) -> (Tensor output, Tensor mean, Tensor var)");
  // grad_weight where input is given. mask: bits; z: the act's input, or with batch_norm [3, C] =
  // a, b, c the norm's, through which the gradient goes on as a * g + b * z + c; without a mask an
  // act needs [5, C] = a, b, c, scale, shift. What is not wanted is [0].
  m.def(
      "depthwise_backward(Tensor grad_output, Tensor weight, Tensor? input, SymInt[2] input_size, "
      "SymInt[2] stride, SymInt[2] padding, Tensor? mask=None, Tensor? z=None, "
      "Tensor? batch_norm=None, int act=0, float slope=0, bool need_grad_input=True, "
      "bool need_grad_bias=False) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");

  // 1x1 convolution on the CPU on a weight packed beforehand (unit stride, no padding, one group;
  // float32, channels_last). All but the weight as for depthwise convolutions; grad_input where
  // packed, the dgrad's, is given.
  //
  // weight [K, C, 1, 1], any strides -> float32 [*], good for this process only.
  m.def("pointwise_pack(Tensor weight, bool dgrad) -> Tensor");
  m.def("pointwise_pack_(Tensor(a!) packed, Tensor weight, bool dgrad) -> Tensor(a!)");
  m.def(
      "pointwise_forward(Tensor input, Tensor packed, Tensor? bias, SymInt out_channels, "
      "int act=0, float slope=0) -> (Tensor output, Tensor saved)");
  m.def(
      "pointwise_forward_stats(Tensor input, Tensor packed, Tensor? bias, SymInt out_channels) -> "
      "(Tensor output, Tensor mean, Tensor var)");
  m.def(
      "pointwise_backward(Tensor grad_output, Tensor? packed, Tensor? input, SymInt in_channels, "
      "Tensor? mask=None, Tensor? z=None, Tensor? batch_norm=None, int act=0, float slope=0, "
      "bool need_grad_bias=False, bool channels_last=True) -> "
      "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");

  // How many tensors share a tensor's memory, itself included.
  m.def("storage_users(Tensor tensor) -> int");
  // A number that changes with any of a dense tensor's values, wherever they were written.
  m.def("checksum(Tensor tensor) -> int");

  // Convolution with a stride on the CPU, on a weight packed beforehand (dilation 1, one group;
  // float32, channels_last): 3x3 with stride 2 and padding 1, or 1x1 with any stride, unpadded.
  //
  // weight [K, C, 3, 3] or [K, C, 1, 1], any strides -> float32 [36 | 1, *], for this process only.
  m.def("strided_pack(Tensor weight, bool dgrad) -> Tensor");
  // Packs a weight where another of its shape was packed.
  m.def("strided_pack_(Tensor(a!) packed, Tensor weight, bool dgrad) -> Tensor(a!)");
  // input [N, C, H, W] -> [N, K, H', W'], channels_last.
  m.def(
      "strided_forward(Tensor input, Tensor packed, Tensor? bias, SymInt out_channels, "
      "SymInt[2] kernel, SymInt[2] stride, SymInt[2] padding) -> Tensor");
  // grad_output [N, K, H', W'] -> [N, in_channels, *input_size], channels_last.
  m.def(
      "strided_dgrad(Tensor grad_output, Tensor packed, SymInt in_channels, SymInt[2] input_size, "
      "SymInt[2] kernel, SymInt[2] stride, SymInt[2] padding) -> Tensor");
}

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
  for (const char* absent : {"cuda", "cuda_archs", "without_cuda"}) {
    info[absent] = pybind11::none();
  }
#ifdef WUS_CUDA
  info["cuda"] = WUS_CUDA;
  info["cuda_archs"] = WUS_CUDA_ARCHS;
#else
  info["without_cuda"] = WUS_WITHOUT_CUDA;
#endif
  info["cpu_capability"] = wus::cpu::isa_name();
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The compiled half of wus_ext; importing it registers torch.ops.wus.";
  m.def("build_info", &build_info);
  wus::chains::bind(m);
  wus::deferral::bind(m);
}
