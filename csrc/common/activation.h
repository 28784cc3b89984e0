// What follows a normalisation, for the kernels of the CPU and of the GPU alike.
#pragma once

namespace wus {

enum Activation : int {
  kNone = 0,
  kReluMask = 1,       // stores a bit mask, for backward
  kReluMaxPool = 2,    // 2x2 max-pool behind it; stores codes, see layout.h
  kReluRecompute = 3,  // stores nothing: backward applies scale and shift again
};

}  // namespace wus
