// The weight gradient of a Winograd convolution. Rounds of as many tiles as a shared cache holds
// are transformed by all threads; each then multiplies its own blocks of the weight, a panel of
// outputs by a panel of inputs, over the round's tiles. A block's sums depend neither on the number
// of threads nor on their timing.
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "cpu/gemm/kernels.h"
#include "cpu/scratch.h"
#include "cpu/winograd/schedule.h"

namespace wus::cpu {
namespace {

struct Round {
  int64_t first, last;  // tiles
};

// Transformed maps of one round, in panels of channels.
WinogradTiles panels_of(float* data, int64_t channels, int64_t tiles) {
  const int64_t panel = WUS_DISPATCH(gemm_kernels).panel;
  return {data, panel, divide_up(channels, panel) * tiles * panel + 16, tiles * panel, nullptr};
}

void transform(const WeightGradient& work, const Round& round, const WinogradTiles& v,
               const WinogradTiles& g) {
  const auto& kernels = WUS_DISPATCH(winograd_kernels);
  const int scheme = static_cast<int>(work.scheme.kernel);
  constexpr int64_t kChunk = 16;
  const auto shifted = [](WinogradTiles tiles, int64_t by) {
    tiles.data += by * tiles.row;
    return tiles;
  };
  at::parallel_for(0, divide_up(round.last - round.first, kChunk), 1,
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       const int64_t first = round.first + i * kChunk,
                                     last = std::min(round.last, first + kChunk);
                       kernels.input[scheme][static_cast<int>(WinogradSource::plain)](
                           work.input, first, last, shifted(v, i * kChunk), nullptr);
                       kernels.grad[scheme][static_cast<int>(work.source)](
                           work.grad, first, last, shifted(g, i * kChunk), nullptr);
                     }
                   });
}

}  // namespace

bool run_winograd_wgrad(const WeightGradient& work, int64_t tiles) {
  const auto& kernels = WUS_DISPATCH(winograd_kernels);
  const auto& gemm = WUS_DISPATCH(gemm_kernels);
  const int64_t inputs = work.input.channels, outputs = work.grad.channels;
  const int64_t frequencies = work.scheme.frequencies, panel = gemm.panel;
  const int64_t rows = divide_up(outputs, panel), columns = divide_up(inputs, panel);

  constexpr int64_t kCacheFloats = int64_t{4} << 20;
  const int64_t fitting = kCacheFloats / (frequencies * (rows + columns) * panel);
  const int64_t rounds = divide_up(tiles, std::clamp<int64_t>(fitting, 1, tiles));
  const int64_t most = divide_up(tiles, rounds);
  WinogradTiles v = panels_of(nullptr, inputs, most), g = panels_of(nullptr, outputs, most);
  // Sums of one round are read where they were written; those of several must be kept.
  const int64_t block = frequencies * panel * panel;
  const int64_t kept = rounds == 1 ? at::get_num_threads() : rows * columns;
  float* memory = scratch(frequencies * (v.plane + g.plane) + kept * block);
  v.data = memory;
  g.data = v.data + frequencies * v.plane;
  float* blocks = g.data + frequencies * g.plane;

  std::atomic<bool> trusted = true;
  for (int64_t r = 0; r < rounds; ++r) {
    const Round round{tiles * r / rounds, tiles * (r + 1) / rounds};
    transform(work, round, v, g);
    at::parallel_for(0, rows * columns, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / columns, column = i % columns;
        const int64_t height = std::min(panel, outputs - row * panel);
        float* sums = blocks + (rounds == 1 ? at::get_thread_num() : i) * block;
        for (int64_t f = 0; f < frequencies; ++f) {
          gemm.run_transposed(g.data + f * g.plane + row * g.panel,
                              v.data + f * v.plane + column * v.panel, sums + f * panel * panel,
                              height, round.last - round.first, r > 0);
        }
        if (r + 1 < rounds) continue;
        WinogradGradient to = work.weight;
        to.data += row * panel * to.output + column * panel * to.input;
        if (!kernels.wgrad[static_cast<int>(work.scheme.kernel)](
                sums, to, height, std::min(panel, inputs - column * panel))) {
          trusted = false;
        }
      }
    });
  }
  return trusted;
}

}  // namespace wus::cpu
