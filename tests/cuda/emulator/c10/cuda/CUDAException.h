// No errors to ask for: see ../../cuda_runtime_api.h.
#pragma once
#define C10_CUDA_KERNEL_LAUNCH_CHECK()
