// Products of cuBLASLt whose epilogue does what surrounds a linear layer in a skip step.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

namespace wus::cuda {

// Row-major operands, dense; cuBLASLt sees each of them transposed, as columns of features.
//   kForward:  output [samples, out] = relu(input [samples, in] * weight [out, in]^T + bias [out]);
//              writes aux, one bit an element of output, in cuBLASLt's own order.
//   kBackward: output [samples, in] = input [samples, out] * weight [out, in], behind the bits of
//              aux, which kForward wrote for the layer below; writes bias [in], its sum over
//              samples.
enum class LtPass { kForward, kBackward };

struct LtProblem {
  int device;
  cudaDataType_t type;  // of all operands; sums are in float
  bool tf32;
  LtPass pass;
  int64_t samples, in, out;

  int64_t features() const { return pass == LtPass::kForward ? out : in; }  // of the output
  bool operator<(const LtProblem& other) const;
};

struct LtPlan {
  cublasLtMatmulAlgo_t algorithm;
  size_t workspace;  // bytes
};

struct LtOperands {  // each at a multiple of kLtAlignment
  const void* input;
  const void* weight;
  void* output;
  void* bias;  // of kForward: read only
  void* aux;   // of kBackward: read only
};

constexpr int kLtAlignment = 16;  // bytes

// Bytes between the bits of one sample and those of the next: cuBLASLt asks for 128 bits.
constexpr int64_t lt_aux_pitch(int64_t features) { return (features + 127) / 128 * 16; }

// cuBLASLt's first choice for a problem, asked for once; null where it has none. No plan adds up
// parts of a sum in an order that is left to chance.
const LtPlan* lt_plan(cublasLtHandle_t handle, const LtProblem& problem);

void lt_run(cublasLtHandle_t handle, const LtProblem& problem, const LtPlan& plan,
            const LtOperands& operands, void* workspace, cudaStream_t stream);

}  // namespace wus::cuda
