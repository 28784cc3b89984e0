#pragma once

#include <ATen/ops/empty.h>

namespace wus::cpu {

// [N, channels, height, width] in channels_last, with N and the type of another map.
inline at::Tensor empty_map(const at::Tensor& like, int64_t channels, int64_t height,
                            int64_t width) {
  return at::empty({like.size(0), channels, height, width},
                   like.options().memory_format(at::MemoryFormat::ChannelsLast));
}

}  // namespace wus::cpu
