// Linear layers whose ReLU, mask and bias gradient are done by cuBLASLt, in the products
// themselves.
#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "cuda/epilogue/lt_matmul.h"
#include "cuda/launch.h"

namespace wus::cuda {
namespace {

cudaDataType_t type_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kHalf:
      return CUDA_R_16F;
    case at::kBFloat16:
      return CUDA_R_16BF;
    default:
      return CUDA_R_32F;
  }
}

LtProblem problem_of(const at::Tensor& input, LtPass pass, int64_t in, int64_t out, bool tf32) {
  const bool rounded = tf32 && input.scalar_type() == at::kFloat;
  return {input.get_device(), type_of(input), rounded, pass, input.size(0), in, out};
}

void check_matrix(const at::Tensor& t, const char* name, int64_t columns, const at::Tensor& like) {
  TORCH_CHECK_VALUE(t.dim() == 2 && t.size(1) == columns && t.scalar_type() == like.scalar_type() &&
                        t.device() == like.device(),
                    name, " must be [*, ", columns, "] of ", like.scalar_type(), " on ",
                    like.device(), ", got ", t.scalar_type(), " of size ", t.sizes(), " on ",
                    t.device());
}

// The tensor dense and aligned as plans expect it: itself, or a copy.
at::Tensor aligned(const at::Tensor& t) {
  const at::Tensor dense = t.contiguous();
  const auto address = reinterpret_cast<uintptr_t>(dense.const_data_ptr());
  return address % kLtAlignment ? dense.clone() : dense;
}

void run(const LtProblem& problem, const at::Tensor& input, const at::Tensor& weight,
         const at::Tensor& output, const at::Tensor& bias, const at::Tensor& aux) {
  const auto handle = at::cuda::getCurrentCUDABlasLtHandle();
  const LtPlan* plan = lt_plan(handle, problem);
  TORCH_CHECK(plan, "cuBLASLt has no such product for ", problem.samples, " samples, ", problem.in,
              " features in and ", problem.out, " out in ", input.scalar_type(),
              "; ask linear_epilogues_exist first");
  const auto workspace =
      at::empty({static_cast<int64_t>(plan->workspace)}, input.options().dtype(at::kByte));
  const LtOperands operands{input.const_data_ptr(), weight.const_data_ptr(),
                            output.mutable_data_ptr(), bias.data_ptr(), aux.data_ptr()};
  lt_run(handle, problem, *plan, operands, workspace.mutable_data_ptr(),
         c10::cuda::getCurrentCUDAStream());
}

bool linear_epilogues_exist(const at::Tensor& input, int64_t out_features, int64_t next_features,
                            bool tf32) {
  check_float(input, "input");
  if (input.dim() != 2 || input.numel() == 0) return false;
  const c10::cuda::CUDAGuard guard(input.device());
  const auto handle = at::cuda::getCurrentCUDABlasLtHandle();
  const auto has = [&](LtPass pass, int64_t in, int64_t out) {
    return lt_plan(handle, problem_of(input, pass, in, out, tf32)) != nullptr;
  };
  return has(LtPass::kForward, input.size(1), out_features) &&
         has(LtPass::kBackward, out_features, next_features);
}

std::tuple<at::Tensor, at::Tensor> linear_relu_aux(const at::Tensor& input,
                                                   const at::Tensor& weight, const at::Tensor& bias,
                                                   bool tf32) {
  check_float(input, "input");
  TORCH_CHECK_VALUE(input.dim() == 2, "input must be [N, in_features], got size ", input.sizes());
  check_matrix(weight, "weight", input.size(1), input);
  TORCH_CHECK_VALUE(
      bias.dim() == 1 && bias.size(0) == weight.size(0) &&
          bias.scalar_type() == input.scalar_type() && bias.device() == input.device(),
      "bias must be [", weight.size(0), "] of ", input.scalar_type(), " on ", input.device(),
      ", got ", bias.scalar_type(), " of size ", bias.sizes(), " on ", bias.device());
  const c10::cuda::CUDAGuard guard(input.device());
  const int64_t samples = input.size(0), out = weight.size(0);
  at::Tensor output = at::empty({samples, out}, input.options());
  at::Tensor aux = at::empty({samples, lt_aux_pitch(out)}, input.options().dtype(at::kByte));
  const auto problem = problem_of(input, LtPass::kForward, input.size(1), out, tf32);
  run(problem, aligned(input), aligned(weight), output, aligned(bias), aux);
  return {output, aux};
}

std::tuple<at::Tensor, at::Tensor> linear_drelu_bgrad(const at::Tensor& grad_output,
                                                      const at::Tensor& weight,
                                                      const at::Tensor& aux, bool tf32) {
  check_float(grad_output, "grad_output");
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight must be [out_features, in_features], got size ",
                    weight.sizes());
  check_matrix(grad_output, "grad_output", weight.size(0), weight);
  const int64_t samples = grad_output.size(0), in = weight.size(1);
  check_bytes(aux, "aux", {samples, lt_aux_pitch(in)}, grad_output.device());
  const c10::cuda::CUDAGuard guard(grad_output.device());
  at::Tensor grad_input = at::empty({samples, in}, grad_output.options());
  at::Tensor grad_bias = at::empty({in}, grad_output.options());
  const auto problem = problem_of(grad_output, LtPass::kBackward, in, weight.size(0), tf32);
  run(problem, aligned(grad_output), aligned(weight), grad_input, grad_bias, aux);
  return {grad_input, grad_bias};
}

TORCH_LIBRARY_IMPL(wus, CUDA, m) {
  m.impl("linear_epilogues_exist", &linear_epilogues_exist);
  m.impl("linear_relu_aux", &linear_relu_aux);
  m.impl("linear_drelu_bgrad", &linear_drelu_bgrad);
}

}  // namespace
}  // namespace wus::cuda
