// Memory that a kernel writes and reads again within one call.
#pragma once

#include <stdint.h>

namespace wus::cpu {

// This thread's scratch memory, for `floats` floats, aligned to a cache line; good until the next
// call on this thread. It only grows, and is freed with the thread.
float* scratch(int64_t floats);

// The distance of rows of `channels` floats: rows that are multiples of 4 KiB apart would share
// cache sets.
inline int64_t padded_row(int64_t channels) { return (channels + 31) / 32 * 32 + 16; }

}  // namespace wus::cpu
