#include "cuda/epilogue/lt_matmul.h"

#include <c10/util/Exception.h>

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <type_traits>

namespace wus::cuda {
namespace {

constexpr size_t kMostWorkspace = size_t{32} << 20;

void check(cublasStatus_t status, const char* call) {
  TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, call, " failed with status ",
              static_cast<int>(status));
}
#define WUS_LT(call, ...) check(call(__VA_ARGS__), #call)

template <auto destroy>
struct Destroy {
  template <class T>
  void operator()(T* descriptor) const {
    destroy(descriptor);
  }
};
template <class Handle, auto destroy>
using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Destroy<destroy>>;
using Layout = Owned<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;
using Operation = Owned<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>;
using Preference = Owned<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>;

Layout columns(cudaDataType_t type, int64_t rows, int64_t cols) {
  cublasLtMatrixLayout_t layout;
  WUS_LT(cublasLtMatrixLayoutCreate, &layout, type, rows, cols, rows);
  return Layout(layout);
}

template <class T>
void set(const Operation& operation, cublasLtMatmulDescAttributes_t attribute, T value) {
  WUS_LT(cublasLtMatmulDescSetAttribute, operation.get(), attribute, &value, sizeof value);
}

template <class T>
void set(const Preference& preference, cublasLtMatmulPreferenceAttributes_t attribute, T value) {
  WUS_LT(cublasLtMatmulPreferenceSetAttribute, preference.get(), attribute, &value, sizeof value);
}

// A row-major [rows, cols] is the column-major [cols, rows]: output^T = op(weight^T) * input^T.
struct Descriptors {
  Operation operation;
  Layout weight, input, output;

  Descriptors(const LtProblem& p, void* bias, void* aux) {
    const bool forward = p.pass == LtPass::kForward;
    cublasLtMatmulDesc_t made;
    WUS_LT(cublasLtMatmulDescCreate, &made,
           p.tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F, CUDA_R_32F);
    operation.reset(made);
    set<int32_t>(operation, CUBLASLT_MATMUL_DESC_TRANSA, forward ? CUBLAS_OP_T : CUBLAS_OP_N);
    set<int32_t>(operation, CUBLASLT_MATMUL_DESC_TRANSB, CUBLAS_OP_N);
    set<uint32_t>(operation, CUBLASLT_MATMUL_DESC_EPILOGUE,
                  forward ? CUBLASLT_EPILOGUE_RELU_AUX_BIAS : CUBLASLT_EPILOGUE_DRELU_BGRAD);
    set(operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
    set(operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux);
    set<int64_t>(operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, lt_aux_pitch(p.features()) * 8);
    weight = columns(p.type, p.in, p.out);
    input = columns(p.type, forward ? p.in : p.out, p.samples);
    output = columns(p.type, p.features(), p.samples);
  }
};

std::optional<LtPlan> ask(cublasLtHandle_t handle, const LtProblem& problem) {
  // Only how these addresses are aligned is looked at.
  void* const somewhere = reinterpret_cast<void*>(uintptr_t{kLtAlignment});
  const Descriptors d(problem, somewhere, somewhere);
  cublasLtMatmulPreference_t made;
  WUS_LT(cublasLtMatmulPreferenceCreate, &made);
  const Preference preference(made);
  set<uint64_t>(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kMostWorkspace);
  // Parts of a sum are kept in float and added in a step of their own.
  set<uint32_t>(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);
  for (const auto alignment :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
    set<uint32_t>(preference, alignment, kLtAlignment);
  }
  cublasLtMatmulHeuristicResult_t best{};
  int found = 0;
  const auto status = cublasLtMatmulAlgoGetHeuristic(handle, d.operation.get(), d.weight.get(),
                                                     d.input.get(), d.output.get(), d.output.get(),
                                                     preference.get(), 1, &best, &found);
  if (status != CUBLAS_STATUS_SUCCESS || found == 0 || best.state != CUBLAS_STATUS_SUCCESS) {
    return std::nullopt;
  }
  return LtPlan{best.algo, best.workspaceSize};
}

}  // namespace

bool LtProblem::operator<(const LtProblem& other) const {
  const auto key = [](const LtProblem& p) {
    return std::tuple(p.device, p.type, p.tf32, p.pass, p.samples, p.in, p.out);
  };
  return key(*this) < key(other);
}

const LtPlan* lt_plan(cublasLtHandle_t handle, const LtProblem& problem) {
  static std::mutex mutex;
  static std::map<LtProblem, std::optional<LtPlan>> plans;  // its elements stay where they are
  const std::lock_guard lock(mutex);
  auto found = plans.find(problem);
  if (found == plans.end()) found = plans.emplace(problem, ask(handle, problem)).first;
  return found->second ? &*found->second : nullptr;
}

void lt_run(cublasLtHandle_t handle, const LtProblem& problem, const LtPlan& plan,
            const LtOperands& operands, void* workspace, cudaStream_t stream) {
  const Descriptors d(problem, operands.bias, operands.aux);
  const float one = 1, zero = 0;
  WUS_LT(cublasLtMatmul, handle, d.operation.get(), &one, operands.weight, d.weight.get(),
         operands.input, d.input.get(), &zero, operands.output, d.output.get(), operands.output,
         d.output.get(), &plan.algorithm, workspace, plan.workspace, stream);
}

}  // namespace wus::cuda
