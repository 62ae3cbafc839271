// Many rows of bf16 on Intel AMX: weights become bf16 once they are scaled, (code − zero) · scale, exact until that one
// rounding, and products add up in the tiles from group to group.
//
// Multiplying the scales into each group's products instead, as amx.cpp does, takes no rounding but as long as the
// products themselves. A slice of a block is decoded into the L1 cache, meets all rows, and is followed by the next.
#pragma once

#include <algorithm>

#include "planes_simd.h"
#include "simd512.h"

namespace parofx {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0..3 collect products, 4 and 5 hold activations, 6 and 7 codes. All 16 rows are always computed; those past
// the last row of x are dropped. `words` is the depth of one product, 16 or, for 32 int8 channels, 8.
TileConfig tile_config(int words) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    const bool activation = i == 4 || i == 5;
    const bool codes = i == 6 || i == 7;
    config.rows[i] = static_cast<uint8_t>(codes ? words : kTileRows);
    config.row_bytes[i] = static_cast<uint16_t>(sizeof(uint32_t) * (activation ? words : kTileWords));
  }
  return config;
}

void configure_tiles(int64_t line_words) {
  const TileConfig config = tile_config(static_cast<int>(line_words < kTileWords ? line_words : kTileWords));
  __asm__ volatile("" ::"r"(&config) : "memory"); // gcc thinks that _tile_loadconfig reads eight bytes only
  _tile_loadconfig(&config);
}

// Input channels that are decoded at a time: 16 KiB of weights.
constexpr int kSliceChannels = 256;
static_assert(kSliceChannels / 2 * kBlockColumns <= kUnpackedWords);

// Activations of one part take half a megabyte, a quarter of the smallest L2 cache beside AMX.
Blocking scaled_blocking(const Activation& activation) { return {256, 2 * kTileRows, 1024 / activation.group_size}; }

// Decodes one group of a block: rows of 32 pairs of channels.
void decode_scaled(const MultiplyJob& job, int64_t group, uint32_t* out) {
  constexpr int kSteps = words_per_plane(Format::bf16);
  constexpr int64_t chunk_bytes = kBlockColumns * sizeof(uint32_t);
  const int chunks = job.activation->group_size / kChunk;
  const uint8_t* weight =
      job.bits == 3 ? widen_planes<Simd512>(job, group) : job.block.weight + group * chunks * chunk_bytes;
  const int64_t ahead = prefetch_distance(job);
  const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
  const __m512i interleaved = _mm512_load_si512(order);
  const int64_t column = group * kBlockColumns;
  const auto scale_of = [&](int half) { return Simd512::load_as<DType::f16>(job.block.scales, column + half * 16); };
  const __m512 scales[2] = {scale_of(0), scale_of(1)};
  const auto shift_of = [&](int half) {
    return _mm512_mul_ps(scales[half], Simd512::load_bytes(job.block.zeros + column + half * 16));
  };
  const __m512 shifts[2] = {shift_of(0), shift_of(1)};
  for (int chunk = 0; chunk < chunks; ++chunk) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const uint8_t* from = weight + chunk * chunk_bytes + half * 64;
      const __m512i words = _mm512_loadu_si512(from);
      const __m512 scale = scales[half], shift = shifts[half];
      Simd512::prefetch(from + ahead);
#pragma GCC unroll 4
      for (int step = 0; step < kSteps; ++step) {
        // The permutation reads four bits of an index, which are a code.
        const __m512 first = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * step), values);
        const __m512 second = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * step + 16), values);
        const __m512bh both =
            _mm512_cvtne2ps_pbh(_mm512_fmsub_ps(second, scale, shift), _mm512_fmsub_ps(first, scale, shift));
        uint32_t* to = out + (chunk * kSteps + step) * kBlockColumns + half * 16;
        _mm512_store_si512(to, _mm512_permutexvar_epi16(interleaved, reinterpret_cast<const __m512i&>(both)));
      }
    }
  }
}

// Adds the products of some groups for 16 or, kPair, 32 rows to their fp32 outputs, or begins with them.
template <bool kPair>
void multiply_slice(
    const Activation& activation, int64_t group_begin, int64_t group_end, int64_t row, const uint32_t* weights,
    float* out) {
  constexpr int64_t line_bytes = kBlockColumns * sizeof(uint32_t); // of weights and of outputs
  constexpr int64_t below = kTileRows * kBlockColumns;
  constexpr int64_t tile_line = kTileWords * sizeof(uint32_t);
  const int64_t row_words = activation.row_words();
  // gcc does not know that tile loads read memory.
  __asm__ volatile("" ::: "memory");
  if (group_begin == 0) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, out, line_bytes);
    _tile_loadd(1, out + kTileWords, line_bytes);
    if constexpr (kPair) {
      _tile_loadd(2, out + below, line_bytes);
      _tile_loadd(3, out + below + kTileWords, line_bytes);
    }
  }
  for (int64_t group = group_begin; group < group_end; ++group) {
    const uint32_t* x = activation.row(group, row);
    for (int64_t word = 0; word < row_words; word += kTileWords, weights += kTileWords * kBlockColumns) {
      _tile_loadd(6, weights, line_bytes);
      _tile_loadd(7, weights + kTileWords, line_bytes);
      _tile_loadd(4, x + word * kTileRows, tile_line);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kPair) {
        _tile_loadd(5, x + (row_words + word) * kTileRows, tile_line);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, out, line_bytes);
  _tile_stored(1, out + kTileWords, line_bytes);
  if constexpr (kPair) {
    _tile_stored(2, out + below, line_bytes);
    _tile_stored(3, out + below + kTileWords, line_bytes);
  }
}

void multiply_scaled(const MultiplyJob& job) {
  const Activation& activation = *job.activation;
  const int64_t group_words = activation.row_words() * kBlockColumns;
  const int64_t slice = kSliceChannels / activation.group_size;
  configure_tiles(activation.row_words());
  for (int64_t begin = job.group_begin; begin < job.group_end; begin += slice) {
    const int64_t end = std::min(begin + slice, job.group_end);
    for (int64_t group = begin; group < end; ++group) {
      decode_scaled(job, group, job.unpacked + (group - begin) * group_words);
    }
    for (int64_t row = 0; row < job.row_count; row += 2 * kTileRows) {
      const auto multiply = job.row_count - row > kTileRows ? multiply_slice<true> : multiply_slice<false>;
      multiply(activation, begin, end, job.row_begin + row, job.unpacked, job.tile + row * kBlockColumns);
    }
  }
  _tile_release();
}

} // namespace
} // namespace parofx
