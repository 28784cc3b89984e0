#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/gemm/kernels.h"
#include "cpu/scratch.h"
#include "cpu/strided/kernels.h"
#include "cpu/strided/strided.h"
#include "cpu/winograd/schedule.h"
#include "cpu/winograd/tile_notes.h"

namespace wus::cpu {
namespace {

constexpr int kProducts = kStridedPoints * kStridedPoints;
enum Direction { kForward, kDgrad };

// Each thread takes chunks of tiles through all three steps, the last two for one panel of output
// channels at a time, so that the products stay in its cache. Returns whether the outputs can be
// trusted.
bool run(Direction direction, const WinogradInput& in, const WinogradOutput& out, int64_t images,
         const float* packed) {
  const auto& kernels = WUS_DISPATCH(strided_kernels);
  const auto& gemm = WUS_DISPATCH(gemm_kernels);
  const int64_t plane = plane_size(in.channels, out.channels);
  const int64_t tiles = images * in.tile_rows * in.tile_cols;
  if (tiles == 0) return true;
  constexpr int64_t kChunk = 28;
  const int64_t threads = at::get_num_threads();
  const int64_t chunk = divide_up(tiles, divide_up(divide_up(tiles, kChunk), threads) * threads);
  const int64_t v_row = padded_row(in.channels), m_row = padded_row(gemm.panel);
  const int64_t v_plane = chunk * v_row + 16, m_plane = chunk * m_row + 16;
  TileNotes notes(tiles);
  at::parallel_for(0, divide_up(tiles, chunk), 1, [&](int64_t begin, int64_t end) {
    float* memory = scratch(kProducts * (v_plane + m_plane));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * chunk, last = std::min(tiles, first + chunk);
      const auto v = notes.place(memory, v_row, v_plane, 0, first);
      const auto m = notes.place(memory + kProducts * v_plane, m_row, m_plane, 0, first);
      kernels.input[direction](in, first, last, v);
      for (int64_t channel = 0; channel < out.channels; channel += gemm.panel) {
        for (int product = 0; product < kProducts; ++product) {
          gemm.run(v.data + product * v_plane, v_row,
                   packed + strided_weight(product) * plane + channel * in.channels,
                   m.data + product * m_plane, m_row, last - first, in.channels, 1, false);
        }
        WinogradOutput part = out;
        part.y += channel;
        if (part.bias != nullptr) part.bias += channel;
        notes.note(kernels.output[direction](
            part, first, last, m, std::min<int64_t>(gemm.panel, out.channels - channel)));
      }
    }
  });
  return notes.trusted();
}

}  // namespace

bool polyphase_forward(WinogradInput in, WinogradOutput out, int64_t images, const float* packed) {
  in.tile_rows = out.tile_rows = divide_up(out.height, kStridedTile);
  in.tile_cols = out.tile_cols = divide_up(out.width, kStridedTile);
  return run(kForward, in, out, images, packed);
}

bool polyphase_dgrad(WinogradInput in, WinogradOutput out, int64_t images, const float* packed) {
  in.tile_rows = out.tile_rows = divide_up(in.height, kStridedTile);
  in.tile_cols = out.tile_cols = divide_up(in.width, kStridedTile);
  return run(kDgrad, in, out, images, packed);
}

void polyphase_pack(const WinogradWeight& weight, int64_t inputs, int64_t outputs, float* packed) {
  const auto& kernels = WUS_DISPATCH(strided_kernels);
  const int64_t panel = WUS_DISPATCH(gemm_kernels).panel, plane = plane_size(inputs, outputs);
  for (int64_t i = 1; i <= kStridedWeights * kStridedWeights; ++i) {
    std::fill_n(packed + i * plane - panel, panel, 0.f);
  }
  constexpr int64_t kInputs = 64;
  const int64_t parts = divide_up(inputs, kInputs);
  at::parallel_for(0, divide_up(outputs, panel) * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = i / parts * panel, first = i % parts * kInputs;
      WinogradWeight part = weight;
      part.data += column * weight.output;
      kernels.weight(part, std::min(panel, outputs - column), first,
                     std::min(inputs, first + kInputs), packed + column * inputs, plane);
    }
  });
}

}  // namespace wus::cpu
