// What the tiles of one call tell about its numbers.
#pragma once

#include <atomic>
#include <memory>

#include "cpu/winograd/kernels.h"

namespace wus::cpu {

class TileNotes {
 public:
  explicit TileNotes(int64_t tiles) : empty_(new uint64_t[tiles]) {}

  // Where the transformed tiles from `first` on lie, and their notes.
  WinogradTiles place(float* data, int64_t row, int64_t plane, int64_t panel, int64_t first) {
    return {data, row, plane, panel, empty_.get() + first};
  }

  // What an output kernel returned, in any thread.
  void note(bool trusted) {
    if (!trusted) trusted_.store(false, std::memory_order_relaxed);
  }

  bool trusted() const { return trusted_; }

 private:
  std::unique_ptr<uint64_t[]> empty_;
  std::atomic<bool> trusted_ = true;
};

}  // namespace wus::cpu
