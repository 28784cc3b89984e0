// Where a kernel is launched: on a GPU, or on the emulated one of tests/cuda/emulator.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <cuda_runtime_api.h>

namespace wus::cuda {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream,
            Arguments... arguments) {
#if defined(__CUDACC__)
  kernel<<<grid, block, 0, stream>>>(arguments...);
#else
  emulate(grid, block, [=] { kernel(arguments...); });
#endif
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace wus::cuda
