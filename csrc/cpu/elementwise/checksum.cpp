// Whether a tensor's values are what they were, at the speed of memory: xxHash64's loop over
// blocks.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <vector>

namespace wus::cpu {
namespace {

constexpr uint64_t kFirst = 0x9E3779B185EBCA87, kSecond = 0xC2B2AE3D27D4EB4F;
constexpr int64_t kBlock = 1 << 16;

uint64_t mixed(uint64_t sum, uint64_t word) { return std::rotl(sum + word * kSecond, 31) * kFirst; }

uint64_t of_block(const char* data, int64_t bytes) {
  constexpr int64_t kLanes = 4;
  std::array<uint64_t, kLanes> lanes{kFirst, kSecond, 0, kFirst ^ kSecond};
  std::array<uint64_t, kLanes> words;
  constexpr int64_t kStep = sizeof(words);
  int64_t i = 0;
  for (; i + kStep <= bytes; i += kStep) {
    std::memcpy(words.data(), data + i, kStep);
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] = mixed(lanes[j], words[j]);
  }
  words = {};
  std::memcpy(words.data(), data + i, bytes - i);
  uint64_t sum = bytes;
  for (int64_t j = 0; j < kLanes; ++j) sum = mixed(sum, mixed(lanes[j], words[j]));
  return sum;
}

// The same values in another layout may have another sum.
int64_t checksum(const at::Tensor& tensor) {
  const at::Tensor dense = tensor.is_non_overlapping_and_dense() ? tensor : tensor.contiguous();
  const auto bytes = static_cast<int64_t>(dense.nbytes());
  const auto* data = static_cast<const char*>(dense.const_data_ptr());
  std::vector<uint64_t> sums((bytes + kBlock - 1) / kBlock);
  at::parallel_for(0, static_cast<int64_t>(sums.size()), 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      sums[i] = of_block(data + i * kBlock, std::min(kBlock, bytes - i * kBlock));
  });
  uint64_t all = 0;
  for (const uint64_t sum : sums) all = mixed(all, sum);
  return static_cast<int64_t>(all);
}

}  // namespace

TORCH_LIBRARY_IMPL(wus, CPU, m) { m.impl("checksum", checksum); }

}  // namespace wus::cpu
