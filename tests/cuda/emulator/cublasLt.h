// What csrc/cuda/lt_matmul.cpp uses of cuBLASLt, on the CPU and as strict as its header's comments.
// A ReLU mask has its bits in an order of its own, so that none but cuBLASLt can read it.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <vector>

#include "cuda_runtime_api.h"

enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_16F = 2, CUDA_R_16BF = 14 };
enum cublasStatus_t {
  CUBLAS_STATUS_SUCCESS = 0,
  CUBLAS_STATUS_INVALID_VALUE = 7,
  CUBLAS_STATUS_NOT_SUPPORTED = 15
};
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_32F_FAST_TF32 = 77 };
enum { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 };
enum { CUBLASLT_EPILOGUE_RELU_AUX_BIAS = 134, CUBLASLT_EPILOGUE_DRELU_BGRAD = 152 };
enum { CUBLASLT_REDUCTION_SCHEME_NONE = 0, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2 };
enum cublasLtMatmulDescAttributes_t {
  CUBLASLT_MATMUL_DESC_TRANSA = 3,
  CUBLASLT_MATMUL_DESC_TRANSB = 4,
  CUBLASLT_MATMUL_DESC_EPILOGUE = 7,
  CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8,
  CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER = 11,
  CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD = 12
};
enum cublasLtMatmulPreferenceAttributes_t {
  CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,
  CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8
};

struct LtMatrix {
  cudaDataType_t type;
  uint64_t rows, cols;
  int64_t ld;
};
struct LtSettings {
  std::map<int, std::vector<char>> values;

  template <class T>
  T get(int attribute) const {
    T value{};
    const auto found = values.find(attribute);
    if (found != values.end() && found->second.size() == sizeof value) {
      std::memcpy(&value, found->second.data(), sizeof value);
    }
    return value;
  }
};
using cublasLtHandle_t = void*;
using cublasLtMatrixLayout_t = LtMatrix*;
struct LtOperation : LtSettings {
  cublasComputeType_t compute;
};
using cublasLtMatmulDesc_t = LtOperation*;
struct LtPreferences : LtSettings {};
using cublasLtMatmulPreference_t = LtPreferences*;
struct cublasLtMatmulAlgo_t {
  uint64_t data[8];
};
struct cublasLtMatmulHeuristicResult_t {
  cublasLtMatmulAlgo_t algo;
  size_t workspaceSize;
  cublasStatus_t state;
  float wavesCount;
};

inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout,
                                                 cudaDataType_t type, uint64_t rows, uint64_t cols,
                                                 int64_t ld) {
  if (ld < static_cast<int64_t>(rows)) return CUBLAS_STATUS_INVALID_VALUE;
  *layout = new LtMatrix{type, rows, cols, ld};
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
  delete layout;
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* desc,
                                               cublasComputeType_t compute, cudaDataType_t scale) {
  *desc = new LtOperation{{}, compute};
  return scale == CUDA_R_32F ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}
inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) {
  delete desc;
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t lt_set(LtSettings* settings, int attribute, const void* value, size_t bytes,
                             size_t expected) {
  if (bytes != expected) return CUBLAS_STATUS_INVALID_VALUE;
  const char* data = static_cast<const char*>(value);
  settings->values[attribute].assign(data, data + bytes);
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                                     cublasLtMatmulDescAttributes_t attribute,
                                                     const void* value, size_t bytes) {
  return lt_set(desc, attribute, value, bytes,
                attribute < CUBLASLT_MATMUL_DESC_BIAS_POINTER ? 4 : 8);
}
inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
  *preference = new LtPreferences;
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  delete preference;
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(
    cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute,
    const void* value, size_t bytes) {
  return lt_set(preference, attribute, value, bytes,
                attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES ? 8 : 4);
}

// A product that fits together; refused, as some are, where features do not fill 16 bytes, and in
// float32 without TF32.
inline bool lt_fits(const LtOperation& op, const LtMatrix& a, const LtMatrix& b,
                    const LtMatrix& d) {
  const bool transposed = op.get<int32_t>(CUBLASLT_MATMUL_DESC_TRANSA) == CUBLAS_OP_T;
  const int64_t aux_ld = op.get<int64_t>(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD);
  const auto at = [&](auto attribute) { return op.get<uintptr_t>(attribute); };
  const uintptr_t bias = at(CUBLASLT_MATMUL_DESC_BIAS_POINTER);
  const uintptr_t aux = at(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER);
  if (a.type == CUDA_R_32F && op.compute != CUBLAS_COMPUTE_32F_FAST_TF32) return false;
  const uint64_t elements = a.type == CUDA_R_32F ? 4 : 8;
  return (transposed ? a.cols : a.rows) == d.rows && (transposed ? a.rows : a.cols) == b.rows &&
         b.cols == d.cols && aux_ld % 128 == 0 && aux_ld >= static_cast<int64_t>(d.rows) && bias &&
         bias % 16 == 0 && aux && aux % 16 == 0 && a.rows % elements == 0 && a.cols % elements == 0;
}

inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t, cublasLtMatmulDesc_t op, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
    cublasLtMatrixLayout_t, cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference, int,
    cublasLtMatmulHeuristicResult_t* results, int* found) {
  *found = 0;
  if (preference->get<uint32_t>(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK) !=
      CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE) {
    return CUBLAS_STATUS_INVALID_VALUE;  // an order left to chance would be allowed
  }
  if (!lt_fits(*op, *a, *b, *d)) return CUBLAS_STATUS_NOT_SUPPORTED;
  *found = 1;
  results[0] = {{{d->rows, d->cols, b->rows}}, 4096, CUBLAS_STATUS_SUCCESS, 1.f};
  return CUBLAS_STATUS_SUCCESS;
}

template <class T>
void lt_matmul(const LtSettings& op, const T* a, const LtMatrix& a_layout, const T* b,
               const LtMatrix& b_layout, T* d, const LtMatrix& d_layout) {
  const bool transposed = op.get<int32_t>(CUBLASLT_MATMUL_DESC_TRANSA) == CUBLAS_OP_T;
  const bool forward =
      op.get<uint32_t>(CUBLASLT_MATMUL_DESC_EPILOGUE) == CUBLASLT_EPILOGUE_RELU_AUX_BIAS;
  T* bias = op.get<T*>(CUBLASLT_MATMUL_DESC_BIAS_POINTER);
  auto* aux = op.get<uint8_t*>(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER);
  const int64_t aux_ld = op.get<int64_t>(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD);
  for (uint64_t row = 0; row < d_layout.rows; ++row) {
    double sum = 0;
    for (uint64_t col = 0; col < d_layout.cols; ++col) {
      double y = 0;
      for (uint64_t k = 0; k < b_layout.rows; ++k) {
        const uint64_t i = transposed ? k + row * a_layout.ld : row + k * a_layout.ld;
        y += static_cast<double>(a[i]) * static_cast<double>(b[k + col * b_layout.ld]);
      }
      const int64_t bit = aux_ld - 1 - static_cast<int64_t>(row);  // an order of its own
      uint8_t& byte = aux[col * aux_ld / 8 + bit / 8];
      const uint8_t flag = 1 << bit % 8;
      if (forward) {
        y += static_cast<double>(bias[row]);
        byte = y > 0 ? byte | flag : byte & ~flag;
        y = y > 0 ? y : 0;
      } else {
        y = byte & flag ? y : 0;
        sum += y;
      }
      d[row + col * d_layout.ld] = static_cast<T>(static_cast<float>(y));
    }
    if (!forward) bias[row] = static_cast<T>(static_cast<float>(sum));
  }
}

inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t op, const void* alpha,
                                     const void* a, cublasLtMatrixLayout_t a_layout, const void* b,
                                     cublasLtMatrixLayout_t b_layout, const void* beta, const void*,
                                     cublasLtMatrixLayout_t, void* d,
                                     cublasLtMatrixLayout_t d_layout,
                                     const cublasLtMatmulAlgo_t* algorithm, void* workspace,
                                     size_t workspace_bytes, cudaStream_t) {
  const bool planned = algorithm->data[0] == d_layout->rows &&
                       algorithm->data[1] == d_layout->cols && algorithm->data[2] == b_layout->rows;
  if (!planned || !lt_fits(*op, *a_layout, *b_layout, *d_layout) || workspace_bytes < 4096 ||
      *static_cast<const float*>(alpha) != 1 || *static_cast<const float*>(beta) != 0) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  for (const void* operand : {a, b, static_cast<const void*>(d)}) {
    if (reinterpret_cast<uintptr_t>(operand) % 16) return CUBLAS_STATUS_INVALID_VALUE;
  }
  std::memset(workspace, 0xff, workspace_bytes);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    lt_matmul(*op, static_cast<const T*>(a), *a_layout, static_cast<const T*>(b), *b_layout,
              static_cast<T*>(d), *d_layout);
  };
  switch (a_layout->type) {
    case CUDA_R_16F:
      run(c10::Half());
      break;
    case CUDA_R_16BF:
      run(c10::BFloat16());
      break;
    default:
      run(0.f);
  }
  return CUBLAS_STATUS_SUCCESS;
}
