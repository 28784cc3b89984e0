// One kernel of cuDNN for a convolution's data gradient, the mask of the ReLU below it and, if
// asked for, the sum for that layer's bias, where cuDNN has an engine that does it. For sm_90
// cuDNN 9.26 plans other engines with a sum in a fixed order than without one: either may be the
// faster.
#pragma once

#include <cudnn.h>
#include <stddef.h>
#include <stdint.h>

#include <memory>

namespace wus::cuda {

// Dense NHWC maps, KRSC weight, stride 1, one group.
struct DgradProblem {
  enum class Type { kFloat, kHalf, kBFloat16 };
  int device;
  Type type;  // of gradients and weight; sums are in float
  bool tf32;
  bool sum;  // whether the kernel sums for the bias, too
  int64_t images, in_channels, in_height, in_width, out_channels, out_height, out_width;
  int64_t kernel[2], padding[2], dilation[2];

  bool operator<(const DgradProblem& other) const;
};

struct DgradOperands {
  const void* grad_output;
  const void* weight;
  const void* mask;  // int8, 1 where the gradient passes and 0 elsewhere
  void* grad_input;
  float* grad_bias;  // zeros, which receive the sums; null without
};

class DgradGraph {
 public:
  virtual ~DgradGraph() = default;
  virtual size_t workspace() const = 0;  // bytes
  virtual void run(cudnnHandle_t handle, const DgradOperands& operands, void* workspace) = 0;
};

// The graph for a problem, built at the first call, which compiles a kernel; null where no engine
// does it in an order of additions that never changes. may_build: whether it may be built now.
std::shared_ptr<DgradGraph> dgrad_graph(cudnnHandle_t handle, const DgradProblem& problem,
                                        bool may_build);

}  // namespace wus::cuda
