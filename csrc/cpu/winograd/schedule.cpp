#include "cpu/winograd/schedule.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/gemm/kernels.h"
#include "cpu/scratch.h"
#include "cpu/winograd/tile_notes.h"

namespace wus::cpu {

using at::Tensor;

int64_t plane_size(int64_t inputs, int64_t outputs) {
  const int64_t panel = WUS_DISPATCH(gemm_kernels).panel;
  return divide_up(outputs, panel) * inputs * panel + panel;
}

namespace {

// A convolution and what its tiles add up. Sums are kept per chunk of tiles and added in order, so
// that they depend neither on the number of threads nor on their timing.
struct Work : Convolution {
  int64_t tiles;
  TileNotes* notes;
  float* sums;   // [chunks][channels], or null
  float* stats;  // [chunks][3][channels], or null
};

struct Schedule {
  bool spread;  // whether a GEMM over many tiles is spread over threads, or each has its own tiles
  int64_t chunk;  // tiles
};

Schedule schedule(const SchemeInfo& scheme, int64_t inputs, int64_t outputs, int64_t tiles) {
  // One pass of the GEMM, more where fewer frequencies leave room in the cache.
  const int64_t rows = WUS_DISPATCH(gemm_kernels).rows;
  const int64_t chunk = divide_up(14, rows) * rows * (36 / scheme.frequencies);
  // Weights this large would be fetched from memory for each chunk.
  constexpr int64_t kLargeWeight = int64_t{3} << 20;
  if (scheme.frequencies * inputs * outputs < kLargeWeight) return {false, chunk};
  return {true, std::clamp<int64_t>(tiles / 32, 1, chunk)};
}

// Each thread takes chunks of tiles through all three steps within its cache.
void run_by_tiles(const Work& conv, int64_t chunk) {
  const auto& kernels = WUS_DISPATCH(winograd_kernels);
  const auto& gemm = WUS_DISPATCH(gemm_kernels);
  const int scheme = static_cast<int>(conv.scheme.kernel);
  const int64_t inputs = conv.in.channels, outputs = conv.out.channels;
  const int64_t frequencies = conv.scheme.frequencies;
  const int64_t plane = plane_size(inputs, outputs), panels = divide_up(outputs, gemm.panel);
  const int64_t v_row = padded_row(inputs), m_row = padded_row(outputs);
  const int64_t v_plane = chunk * v_row + 16, m_plane = chunk * m_row + 16;
  at::parallel_for(0, divide_up(conv.tiles, chunk), 1, [&](int64_t begin, int64_t end) {
    float* memory = scratch(frequencies * (v_plane + m_plane));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * chunk, last = std::min(conv.tiles, first + chunk);
      const auto v = conv.notes->place(memory, v_row, v_plane, gemm.panel, first);
      const auto m =
          conv.notes->place(memory + frequencies * v_plane, m_row, m_plane, gemm.panel, first);
      kernels.input[scheme][static_cast<int>(conv.source)](
          conv.in, first, last, v, conv.sums ? conv.sums + i * inputs : nullptr);
      for (int64_t f = 0; f < frequencies; ++f) {
        gemm.run(v.data + f * v_plane, v_row, conv.packed + f * plane, m.data + f * m_plane, m_row,
                 last - first, inputs, panels, false);
      }
      conv.notes->note(kernels.output[scheme][static_cast<int>(conv.epilogue)](
          conv.out, first, last, m, conv.stats ? conv.stats + i * 3 * outputs : nullptr));
    }
  });
}

// All threads take one step at a time; each reads the weights of its own frequencies only.
void run_by_frequencies(const Work& conv, int64_t chunk) {
  const auto& kernels = WUS_DISPATCH(winograd_kernels);
  const auto& gemm = WUS_DISPATCH(gemm_kernels);
  const int scheme = static_cast<int>(conv.scheme.kernel);
  const int64_t inputs = conv.in.channels, outputs = conv.out.channels;
  const int64_t frequencies = conv.scheme.frequencies;
  const int64_t plane = plane_size(inputs, outputs), panels = divide_up(outputs, gemm.panel);
  const int64_t v_row = padded_row(inputs), m_row = padded_row(outputs);
  // As many tiles at a time as keep the transformed maps in a shared cache.
  constexpr int64_t kCacheFloats = int64_t{4} << 20;
  const int64_t fitting = kCacheFloats / (frequencies * (v_row + m_row));
  const int64_t round = std::clamp<int64_t>(fitting / chunk, 1, divide_up(conv.tiles, chunk));
  const int64_t v_plane = round * chunk * v_row + 16, m_plane = round * chunk * m_row + 16;
  float* memory = scratch(frequencies * (v_plane + m_plane));
  float* const v = memory;
  float* const m = memory + frequencies * v_plane;
  const int64_t groups = std::min(panels, divide_up(4 * at::get_num_threads(), frequencies));

  const int64_t chunks = divide_up(conv.tiles, chunk);
  for (int64_t start = 0; start < chunks; start += round) {
    const int64_t stop = std::min(chunks, start + round), base = start * chunk;
    const int64_t rows = std::min(conv.tiles, stop * chunk) - base;
    const auto tiles = [&](float* data, int64_t row, int64_t plane, int64_t i) {
      data += (i - start) * chunk * row;
      return conv.notes->place(data, row, plane, gemm.panel, i * chunk);
    };
    at::parallel_for(start, stop, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        kernels.input[scheme][static_cast<int>(conv.source)](
            conv.in, i * chunk, std::min(conv.tiles, (i + 1) * chunk), tiles(v, v_row, v_plane, i),
            conv.sums ? conv.sums + i * inputs : nullptr);
      }
    });
    at::parallel_for(0, frequencies * groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t f = i / groups, group = i % groups;
        const int64_t first = panels * group / groups, last = panels * (group + 1) / groups;
        gemm.run(v + f * v_plane, v_row, conv.packed + f * plane + first * inputs * gemm.panel,
                 m + f * m_plane + first * gemm.panel, m_row, rows, inputs, last - first, false);
      }
    });
    at::parallel_for(start, stop, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        conv.notes->note(kernels.output[scheme][static_cast<int>(conv.epilogue)](
            conv.out, i * chunk, std::min(conv.tiles, (i + 1) * chunk), tiles(m, m_row, m_plane, i),
            conv.stats ? conv.stats + i * 3 * outputs : nullptr));
      }
    });
  }
}

// [chunks][channels] -> [channels], in the order of the chunks.
Tensor add_chunks(const std::vector<float>& sums, int64_t chunks, int64_t channels,
                  const at::TensorOptions& options) {
  std::vector<double> total(channels, 0.0);
  for (int64_t i = 0; i < chunks; ++i) {
    for (int64_t c = 0; c < channels; ++c) total[c] += sums[i * channels + c];
  }
  Tensor result = at::empty({channels}, options);
  std::copy(total.begin(), total.end(), result.mutable_data_ptr<float>());
  return result;
}

bool all_finite(const Tensor& tensor) {
  const float* values = tensor.const_data_ptr<float>();
  return std::all_of(values, values + tensor.numel(), [](float x) { return std::isfinite(x); });
}

// The outputs that the tiles [first, last) cover.
int64_t count_outputs(const Work& conv, int64_t first, int64_t last) {
  int64_t count = 0;
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t col = tile % conv.out.tile_cols;
    const int64_t row = tile / conv.out.tile_cols % conv.out.tile_rows;
    count += std::min(conv.scheme.tile, conv.out.height - row * conv.scheme.tile) *
             std::min(conv.scheme.tile, conv.out.width - col * conv.scheme.tile);
  }
  return count;
}

// Mean and biased variance [2, channels], chunks merged pairwise in order (Chan, Golub, LeVeque).
Tensor merge_stats(const Work& conv, const std::vector<float>& stats, int64_t chunk,
                   const at::TensorOptions& options) {
  const int64_t channels = conv.out.channels;
  std::vector<double> mean(channels, 0.0), squares(channels, 0.0);
  int64_t count = 0;
  for (int64_t first = 0; first < conv.tiles; first += chunk) {
    const int64_t added = count_outputs(conv, first, std::min(conv.tiles, first + chunk));
    const float* pivot = stats.data() + first / chunk * 3 * channels;
    const double n = added, share = n / (count + added);
    for (int64_t c = 0; c < channels; ++c) {
      const double shift = pivot[channels + c] / n;
      const double delta = pivot[c] + shift - mean[c];
      mean[c] += delta * share;
      squares[c] += pivot[2 * channels + c] - n * shift * shift + delta * delta * count * share;
    }
    count += added;
  }
  Tensor result = at::empty({2, channels}, options);
  float* to = result.mutable_data_ptr<float>();
  for (int64_t c = 0; c < channels; ++c) {
    to[c] = count ? mean[c] : std::numeric_limits<float>::quiet_NaN();
    const double variance = squares[c] / count;
    to[channels + c] = variance < 0 ? 0 : variance;
  }
  return result;
}

}  // namespace

Outcome run_winograd(const Convolution& convolution, int64_t images, bool want_sums,
                     const at::TensorOptions& options) {
  Work conv{convolution, 0, nullptr, nullptr, nullptr};
  conv.in.tile_rows = conv.out.tile_rows = divide_up(conv.out.height, conv.scheme.tile);
  conv.in.tile_cols = conv.out.tile_cols = divide_up(conv.out.width, conv.scheme.tile);
  conv.tiles = images * conv.in.tile_rows * conv.in.tile_cols;
  const auto [spread, chunk] =
      schedule(conv.scheme, conv.in.channels, conv.out.channels, conv.tiles);
  const int64_t chunks = divide_up(conv.tiles, chunk);
  const bool want_stats = conv.epilogue == WinogradEpilogue::stats;
  std::vector<float> sums(want_sums ? chunks * conv.in.channels : 0);
  std::vector<float> stats(want_stats ? chunks * 3 * conv.out.channels : 0);
  TileNotes notes(conv.tiles);
  conv.notes = &notes;
  conv.sums = want_sums ? sums.data() : nullptr;
  conv.stats = want_stats ? stats.data() : nullptr;
  if (conv.tiles > 0) spread ? run_by_frequencies(conv, chunk) : run_by_tiles(conv, chunk);
  const bool trusted = notes.trusted();
  if (want_sums) return {add_chunks(sums, chunks, conv.in.channels, options), trusted};
  if (!want_stats) return {at::empty({0}, options), trusted};
  const Tensor merged = merge_stats(conv, stats, chunk, options);
  return {merged, trusted && (conv.tiles == 0 || all_finite(merged))};
}

}  // namespace wus::cpu
