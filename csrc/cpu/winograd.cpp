#include "winograd.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

#include "gemm_kernels.h"
#include "winograd_kernels.h"

namespace wus::cpu {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Scratch memory of this thread: it only grows, and is freed with the thread.
float* scratch(int64_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<float, Free> memory;
  static thread_local int64_t size = 0;
  if (size < floats) {
    size = 0;
    memory.reset();
    const int64_t rounded = divide_up(floats, 16) * 16;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, rounded * sizeof(float))));
    TORCH_CHECK(memory != nullptr, "winograd: no memory for ", rounded, " floats of scratch");
    size = rounded;
  }
  return memory.get();
}

struct SchemeInfo {
  WinogradScheme kernel;
  int64_t tile, frequencies;
};

SchemeInfo scheme_info(int64_t scheme) {
  switch (scheme) {
    case 0:
      return {WinogradScheme::z2, 2, 9};
    case 2:
      return {WinogradScheme::f2, 2, 16};
    case 4:
      return {WinogradScheme::f4, 4, 36};
    default:
      TORCH_CHECK_VALUE(false, "winograd: scheme must be 0, 2 or 4, got ", scheme);
  }
}

// Packed weights: [frequencies][plane], a plane being [panels][inputs][panel] and some padding that
// keeps the planes from falling on the same cache sets.
int64_t plane_size(int64_t inputs, int64_t outputs) {
  const int64_t panel = WUS_DISPATCH(gemm_kernels).panel;
  return divide_up(outputs, panel) * inputs * panel + panel;
}

struct Convolution {
  SchemeInfo scheme;
  WinogradSource source;
  WinogradEpilogue epilogue;
  WinogradInput in;
  WinogradOutput out;
  const float* packed;
  int64_t tiles;
  // Sums are kept per chunk of tiles and added in order, so that they depend neither on the number
  // of threads nor on their timing. [chunks][channels], or null.
  float* sums;
  float* stats;  // [chunks][3][channels], or null
};

// Rows that are multiples of 4 KiB apart would share cache sets.
int64_t padded_row(int64_t channels) { return divide_up(channels, 32) * 32 + 16; }

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
void run_by_tiles(const Convolution& conv, int64_t chunk) {
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
    const WinogradTiles v{memory, v_row, v_plane};
    const WinogradTiles m{memory + frequencies * v_plane, m_row, m_plane};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * chunk, last = std::min(conv.tiles, first + chunk);
      kernels.input[scheme][static_cast<int>(conv.source)](
          conv.in, first, last, v, conv.sums ? conv.sums + i * inputs : nullptr);
      for (int64_t f = 0; f < frequencies; ++f) {
        gemm.run(v.data + f * v_plane, v_row, conv.packed + f * plane, m.data + f * m_plane, m_row,
                 last - first, inputs, panels);
      }
      kernels.output[scheme][static_cast<int>(conv.epilogue)](
          conv.out, first, last, m, conv.stats ? conv.stats + i * 3 * outputs : nullptr);
    }
  });
}

// All threads take one step at a time; each reads the weights of its own frequencies only.
void run_by_frequencies(const Convolution& conv, int64_t chunk) {
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
  const WinogradTiles v{memory, v_row, v_plane};
  const WinogradTiles m{memory + frequencies * v_plane, m_row, m_plane};
  const int64_t groups = std::min(panels, divide_up(4 * at::get_num_threads(), frequencies));

  const int64_t chunks = divide_up(conv.tiles, chunk);
  for (int64_t start = 0; start < chunks; start += round) {
    const int64_t stop = std::min(chunks, start + round), base = start * chunk;
    const int64_t rows = std::min(conv.tiles, stop * chunk) - base;
    const auto shifted = [&](const WinogradTiles& tiles, int64_t i) {
      return WinogradTiles{tiles.data + (i - start) * chunk * tiles.row, tiles.row, tiles.plane};
    };
    at::parallel_for(start, stop, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        kernels.input[scheme][static_cast<int>(conv.source)](
            conv.in, i * chunk, std::min(conv.tiles, (i + 1) * chunk), shifted(v, i),
            conv.sums ? conv.sums + i * inputs : nullptr);
      }
    });
    at::parallel_for(0, frequencies * groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t f = i / groups, group = i % groups;
        const int64_t first = panels * group / groups, last = panels * (group + 1) / groups;
        gemm.run(v.data + f * v_plane, v_row, conv.packed + f * plane + first * inputs * gemm.panel,
                 m.data + f * m_plane + first * gemm.panel, m_row, rows, inputs, last - first);
      }
    });
    at::parallel_for(start, stop, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        kernels.output[scheme][static_cast<int>(conv.epilogue)](
            conv.out, i * chunk, std::min(conv.tiles, (i + 1) * chunk), shifted(m, i),
            conv.stats ? conv.stats + i * 3 * outputs : nullptr);
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

// The outputs that the tiles [first, last) cover.
int64_t count_outputs(const Convolution& conv, int64_t first, int64_t last) {
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
Tensor merge_stats(const Convolution& conv, const std::vector<float>& stats, int64_t chunk,
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

// Runs, and returns the sums over the source's pixels or the statistics of the outputs if wanted.
Tensor run(Convolution conv, int64_t images, bool want_sums, const at::TensorOptions& options) {
  conv.in.tile_rows = conv.out.tile_rows = divide_up(conv.out.height, conv.scheme.tile);
  conv.in.tile_cols = conv.out.tile_cols = divide_up(conv.out.width, conv.scheme.tile);
  conv.tiles = images * conv.in.tile_rows * conv.in.tile_cols;
  const auto [spread, chunk] =
      schedule(conv.scheme, conv.in.channels, conv.out.channels, conv.tiles);
  const int64_t chunks = divide_up(conv.tiles, chunk);
  const bool want_stats = conv.epilogue == WinogradEpilogue::stats;
  std::vector<float> sums(want_sums ? chunks * conv.in.channels : 0);
  std::vector<float> stats(want_stats ? chunks * 3 * conv.out.channels : 0);
  conv.sums = want_sums ? sums.data() : nullptr;
  conv.stats = want_stats ? stats.data() : nullptr;
  if (conv.tiles > 0) spread ? run_by_frequencies(conv, chunk) : run_by_tiles(conv, chunk);
  if (want_sums) return add_chunks(sums, chunks, conv.in.channels, options);
  if (want_stats) return merge_stats(conv, stats, chunk, options);
  return at::empty({0}, options);
}

void check_map(const Tensor& map, const char* name) {
  TORCH_CHECK_VALUE(map.dim() == 4, "winograd: ", name, " must have 4 dimensions, got ", map.dim());
  TORCH_CHECK_TYPE(map.scalar_type() == at::kFloat, "winograd: ", name, " must be float32, got ",
                   map.scalar_type());
  TORCH_CHECK_VALUE(map.size(1) > 0 && map.size(2) > 0 && map.size(3) > 0, "winograd: ", name,
                    " must have channels and pixels, got shape ", map.sizes());
}

void check_sizes(const OptionalTensor& tensor, const char* name, at::ScalarType dtype,
                 at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(tensor && tensor->sizes() == sizes, "winograd: ", name, " must have shape ",
                    sizes, ", got ", tensor ? tensor->sizes() : at::IntArrayRef{});
  TORCH_CHECK_TYPE(tensor->scalar_type() == dtype, "winograd: ", name, " must be ", dtype, ", got ",
                   tensor->scalar_type());
}

void check_packed(const Tensor& packed, const SchemeInfo& scheme, int64_t inputs, int64_t outputs) {
  check_sizes(packed, "packed", at::kFloat, {scheme.frequencies, plane_size(inputs, outputs)});
  TORCH_CHECK_VALUE(packed.is_contiguous(), "winograd: packed must be contiguous");
}

void check_geometry(int64_t scheme, int64_t height, int64_t width, int64_t padding) {
  TORCH_CHECK_VALUE(padding >= 0 && padding <= 2, "winograd: padding must be 0, 1 or 2, got ",
                    padding);
  TORCH_CHECK_VALUE(height + 2 * padding >= 3 && width + 2 * padding >= 3, "winograd: an input of ",
                    height, "x", width, " with padding ", padding,
                    " is smaller than the 3x3 kernel");
  TORCH_CHECK_VALUE(scheme != 0 || (padding == 1 && height <= 2 && width <= 2),
                    "winograd: scheme 0 wants at most 2x2 pixels and padding 1, got ", height, "x",
                    width, " and padding ", padding);
}

Tensor empty_map(const Tensor& like, int64_t channels, int64_t height, int64_t width) {
  return at::empty({like.size(0), channels, height, width},
                   like.options().memory_format(at::MemoryFormat::ChannelsLast));
}

}  // namespace

Tensor winograd_pack(const Tensor& weight, bool dgrad, int64_t scheme) {
  check_map(weight, "weight");
  TORCH_CHECK_VALUE(weight.size(2) == 3 && weight.size(3) == 3,
                    "winograd: weight must be [outputs, inputs, 3, 3], got shape ", weight.sizes());
  const SchemeInfo info = scheme_info(scheme);
  const int64_t inputs = weight.size(dgrad ? 0 : 1), outputs = weight.size(dgrad ? 1 : 0);
  WinogradWeight w{weight.const_data_ptr<float>(), weight.stride(0), weight.stride(1),
                   weight.stride(2), weight.stride(3)};
  if (dgrad) {
    std::swap(w.output, w.input);
    w.data += 2 * (w.y + w.x);
    w.y = -w.y;
    w.x = -w.x;
  }

  const auto kernel = WUS_DISPATCH(winograd_kernels).weight[static_cast<int>(info.kernel)];
  const int64_t panel = WUS_DISPATCH(gemm_kernels).panel, panels = divide_up(outputs, panel);
  const int64_t plane = plane_size(inputs, outputs);
  Tensor packed = at::empty({info.frequencies, plane}, weight.options());
  float* data = packed.mutable_data_ptr<float>();
  for (int64_t f = 0; f < info.frequencies; ++f) {
    std::fill_n(data + (f + 1) * plane - panel, panel, 0.f);
  }
  constexpr int64_t kInputs = 64;
  const int64_t parts = divide_up(inputs, kInputs);
  at::parallel_for(0, panels * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = i / parts * panel, first = i % parts * kInputs;
      WinogradWeight part = w;
      part.data += column * w.output;
      kernel(part, std::min(panel, outputs - column), first, std::min(inputs, first + kInputs),
             data + column * inputs, plane);
    }
  });
  return packed;
}

std::tuple<Tensor, Tensor> winograd_forward(const Tensor& input, const Tensor& packed,
                                            const OptionalTensor& bias, int64_t out_channels,
                                            int64_t padding, int64_t scheme, int64_t epilogue,
                                            const OptionalTensor& affine, bool affine_relu) {
  check_map(input, "input");
  const SchemeInfo info = scheme_info(scheme);
  const int64_t images = input.size(0), channels = input.size(1);
  check_geometry(scheme, input.size(2), input.size(3), padding);
  check_packed(packed, info, channels, out_channels);
  TORCH_CHECK_VALUE(epilogue >= 0 && epilogue < kWinogradEpilogues,
                    "winograd: epilogue must be 0 to 3, got ", epilogue);
  if (bias) check_sizes(bias, "bias", at::kFloat, {out_channels});
  if (affine) check_sizes(affine, "affine", at::kFloat, {2, channels});
  const int64_t height = input.size(2) + 2 * padding - 2, width = input.size(3) + 2 * padding - 2;
  const auto kind = static_cast<WinogradEpilogue>(epilogue);
  const bool pool = kind == WinogradEpilogue::pool;
  TORCH_CHECK_VALUE(!pool || (height >= 2 && width >= 2), "winograd: an output of ", height, "x",
                    width, " is too small to pool");

  const Tensor x = input.contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor b = bias ? bias->contiguous() : Tensor();
  const Tensor rows = affine ? affine->contiguous() : Tensor();
  Tensor y = pool ? empty_map(x, out_channels, height / 2, width / 2)
                  : empty_map(x, out_channels, height, width);
  const auto bytes = x.options().dtype(at::kByte);
  Tensor mask;
  if (pool) mask = at::empty({images, height / 2, width / 2, out_channels}, bytes);
  if (kind == WinogradEpilogue::relu) {
    mask = at::empty({images, height, width, divide_up(out_channels, 8)}, bytes);
  }

  Convolution conv{};
  conv.scheme = info;
  conv.source = !affine       ? WinogradSource::plain
                : affine_relu ? WinogradSource::affine_relu
                              : WinogradSource::affine;
  conv.epilogue = kind;
  conv.packed = packed.const_data_ptr<float>();
  conv.in.x = x.const_data_ptr<float>();
  if (affine) {
    conv.in.scale = rows.const_data_ptr<float>();
    conv.in.shift = conv.in.scale + channels;
  }
  conv.in.height = x.size(2);
  conv.in.width = x.size(3);
  conv.in.channels = channels;
  conv.in.padding = padding;
  conv.out.y = y.mutable_data_ptr<float>();
  conv.out.mask = mask.defined() ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  conv.out.bias = b.defined() ? b.const_data_ptr<float>() : nullptr;
  conv.out.height = height;
  conv.out.width = width;
  conv.out.channels = out_channels;
  Tensor stats = run(conv, images, false, x.options().memory_format(std::nullopt));
  if (mask.defined()) return {y, mask};
  return {y, kind == WinogradEpilogue::stats ? stats : at::empty({0}, bytes)};
}

std::tuple<Tensor, Tensor> winograd_dgrad(const Tensor& grad_output, const Tensor& packed,
                                          const OptionalTensor& mask, int64_t in_channels,
                                          at::IntArrayRef input_size, int64_t padding,
                                          int64_t scheme, int64_t prologue, const OptionalTensor& z,
                                          const OptionalTensor& batch_norm) {
  check_map(grad_output, "grad_output");
  TORCH_CHECK_VALUE(input_size.size() == 2, "winograd: input_size must be (height, width), got ",
                    input_size);
  TORCH_CHECK_VALUE(prologue >= 0 && prologue < 8, "winograd: prologue must be 0 to 7, got ",
                    prologue);
  constexpr WinogradSource kSources[] = {WinogradSource::plain,   WinogradSource::plain,
                                         WinogradSource::bits,    WinogradSource::codes,
                                         WinogradSource::bn,      WinogradSource::bn_bits,
                                         WinogradSource::bn_sign, WinogradSource::bn_codes};
  const WinogradSource source = kSources[prologue];
  const bool pooled = source == WinogradSource::codes || source == WinogradSource::bn_codes;
  const bool bits = source == WinogradSource::bits || source == WinogradSource::bn_bits;
  const bool normalized = prologue >= 4;

  const SchemeInfo info = scheme_info(scheme);
  check_geometry(scheme, input_size[0], input_size[1], padding);
  const int64_t images = grad_output.size(0), channels = grad_output.size(1);
  const int64_t height = input_size[0] + 2 * padding - 2;
  const int64_t width = input_size[1] + 2 * padding - 2;
  const int64_t divisor = pooled ? 2 : 1;
  check_sizes(grad_output, "grad_output", at::kFloat,
              {images, channels, height / divisor, width / divisor});
  check_packed(packed, info, channels, in_channels);
  if (pooled) check_sizes(mask, "mask", at::kByte, {images, height / 2, width / 2, channels});
  if (bits) check_sizes(mask, "mask", at::kByte, {images, height, width, divide_up(channels, 8)});
  if (normalized) {
    check_sizes(z, "z", at::kFloat, {images, channels, height, width});
    const int64_t rows = source == WinogradSource::bn_sign ? 5 : 3;
    check_sizes(batch_norm, "batch_norm", at::kFloat, {rows, channels});
  }

  const Tensor g = grad_output.contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor m = pooled || bits ? mask->contiguous() : Tensor();
  const Tensor saved = normalized ? z->contiguous(at::MemoryFormat::ChannelsLast) : Tensor();
  const Tensor vectors = normalized ? batch_norm->contiguous() : Tensor();
  Tensor grad_input = empty_map(g, in_channels, input_size[0], input_size[1]);

  Convolution conv{};
  conv.scheme = info;
  conv.source = source;
  conv.epilogue = WinogradEpilogue::none;
  conv.packed = packed.const_data_ptr<float>();
  conv.in.x = g.const_data_ptr<float>();
  conv.in.mask = m.defined() ? m.const_data_ptr<uint8_t>() : nullptr;
  if (normalized) {
    conv.in.z = saved.const_data_ptr<float>();
    conv.in.a = vectors.const_data_ptr<float>();
    conv.in.b = conv.in.a + channels;
    conv.in.c = conv.in.b + channels;
    conv.in.scale = conv.in.c + channels;
    conv.in.shift = conv.in.scale + channels;
  }
  conv.in.height = height;
  conv.in.width = width;
  conv.in.channels = channels;
  conv.in.padding = 2 - padding;
  conv.out.y = grad_input.mutable_data_ptr<float>();
  conv.out.height = input_size[0];
  conv.out.width = input_size[1];
  conv.out.channels = in_channels;
  const bool want_sums = prologue >= 1 && prologue <= 3;
  Tensor grad_bias = run(conv, images, want_sums, g.options());
  return {grad_input, grad_bias};
}

TORCH_LIBRARY_IMPL(wus, CPU, m) {
  m.impl("winograd_pack", &winograd_pack);
  m.impl("winograd_forward", &winograd_forward);
  m.impl("winograd_dgrad", &winograd_dgrad);
}

}  // namespace wus::cpu
