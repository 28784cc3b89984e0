// A GPU of one thread, for g++: what the kernels of csrc/cuda use of CUDA.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;
inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace wus::cuda {

// Runs a block's threads on fibers. A fiber goes on to the next thread when one ends, so that only
// those that wait at a barrier need one each.
class Block {
 public:
  explicit Block(std::function<void()> kernel) : kernel_(std::move(kernel)) {}

  void run() {
    const int threads = blockDim.x * blockDim.y;
    next_ = 0;
    for (std::size_t i = 0; next_ < threads; ++i) {
      if (i == fibers().size()) fibers().emplace_back(new Fiber);
      start(*fibers()[i]);
      used_ = i + 1;
    }
    // Every thread runs to its next barrier before any passes it; the order alternates.
    for (bool waiting = true, reverse = true; waiting; reverse = !reverse) {
      waiting = false;
      for (std::size_t i = 0; i < used_; ++i) {
        Fiber& fiber = *fibers()[reverse ? used_ - 1 - i : i];
        if (fiber.done) continue;
        enter(fiber);
        waiting |= !fiber.done;
      }
    }
  }

  // Called by a thread: waits for the others.
  void barrier() {
    Fiber& self = *current_;
    const dim3 thread = threadIdx;
    self.passed_barrier = true;
    swapcontext(&self.context, &main_);
    threadIdx = thread;
  }

  static Block*& running() {
    static Block* block = nullptr;
    return block;
  }

 private:
  static constexpr std::size_t kStack = 1 << 16;
  struct Fiber {
    ucontext_t context;
    bool done, passed_barrier;
    std::vector<char> stack = std::vector<char>(kStack);
  };

  static std::vector<Fiber*>& fibers() {
    static std::vector<Fiber*> all;
    return all;
  }

  void start(Fiber& fiber) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &main_;
    fiber.done = fiber.passed_barrier = false;
    makecontext(&fiber.context, [] { running()->take_threads(); }, 0);
    enter(fiber);
  }

  void enter(Fiber& fiber) {
    current_ = &fiber;
    swapcontext(&main_, &fiber.context);
  }

  void take_threads() {
    const int threads = blockDim.x * blockDim.y;
    Fiber& self = *current_;
    while (next_ < threads && !self.passed_barrier) {
      threadIdx = dim3(next_ % blockDim.x, next_ / blockDim.x);
      ++next_;
      kernel_();
    }
    self.done = true;
  }

  std::function<void()> kernel_;
  ucontext_t main_;
  Fiber* current_ = nullptr;
  std::size_t used_ = 0;
  int next_ = 0;
};

inline void emulate(dim3 grid, dim3 block, std::function<void()> kernel) {
  if (block.x * block.y * block.z > 1024 || block.z > 1 || grid.z > 1) {
    throw std::invalid_argument("a GPU would refuse this launch");
  }
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535) throw std::invalid_argument("bad grid");
  gridDim = grid;
  blockDim = block;
  Block runner(std::move(kernel));
  Block::running() = &runner;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      runner.run();
    }
  }
  Block::running() = nullptr;
}

}  // namespace wus::cuda

inline void __syncthreads() { wus::cuda::Block::running()->barrier(); }
