// A generator with torch's interface whose seed and offset the CPU's generator draws.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/cuda/PhiloxCudaState.h>

namespace at {

struct CUDAGeneratorImpl : CPUGeneratorImpl {
  PhiloxCudaState philox_cuda_state(uint64_t) { return {random64(), 4 * uint64_t{random()}}; }
};

namespace cuda::detail {
inline const Generator& getDefaultCUDAGenerator() { return at::detail::getDefaultCPUGenerator(); }
}  // namespace cuda::detail

}  // namespace at
