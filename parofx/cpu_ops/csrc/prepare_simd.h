// Scale, rotate and convert one group of up to `Simd::kLanes` rows, all within the L1 cache.
//
// Few rows: `RotateRow` rotates one row, its lanes being channels. Many rows: the lanes are rows, so a pair is two
// vectors and no lane ever moves; two transpositions pay for that from about a quarter of the lanes on.
#pragma once

#include "numeric.h"

namespace parofx {
namespace {

template <class Simd, DType dtype>
void load_row(const void* x, int64_t offset, const float* channel_scales, int group_size, float* row) {
  for (int k = 0; k < group_size; k += Simd::kLanes) {
    auto v = Simd::template load_as<dtype>(x, offset + k);
    if (channel_scales) v = Simd::mul(v, Simd::load(channel_scales + k));
    Simd::store(row + k, v);
  }
}

template <class Simd>
void load_rows(const PrepareJob& job, int64_t offset, const float* channel_scales, int rows, float* out) {
  const int group_size = job.out.group_size;
  const auto load = job.dtype == DType::f32 ? load_row<Simd, DType::f32>
      : job.dtype == DType::bf16            ? load_row<Simd, DType::bf16>
                                            : load_row<Simd, DType::f16>;
  for (int row = 0; row < rows; ++row) {
    load(job.x, offset + row * job.row_stride, channel_scales, group_size, out + row * group_size);
  }
}

// Rotates kLanes rows of `group_size` floats in place.
template <class Simd>
void rotate_lanes(float* rows, const GroupRotation& rotation) {
  constexpr int lanes = Simd::kLanes;
  const int group_size = rotation.layout.group_size;
  const int half = group_size / 2;
  alignas(64) float buffers[2][kMaxGroupSize * lanes]; // [channel][row]
  float* now = buffers[0];
  float* next = buffers[1];
  for (int k = 0; k < group_size; k += lanes) {
    typename Simd::Float square[lanes];
    for (int i = 0; i < lanes; ++i) square[i] = Simd::load(rows + i * group_size + k);
    Simd::transpose(square);
    for (int i = 0; i < lanes; ++i) Simd::store(now + (k + i) * lanes, square[i]);
  }
  for (int round = 0; round < rotation.layout.rounds; ++round) {
    const uint8_t* source = rotation.source(round);
    const float* cosines = rotation.cosines(round);
    const float* sines = rotation.sines(round);
    for (int t = 0; t < half; ++t) {
      const auto first = Simd::load(now + source[t] * lanes);
      const auto second = Simd::load(now + source[half + t] * lanes);
      const auto c = Simd::broadcast(cosines[t]);
      const auto s = Simd::broadcast(sines[t]);
      Simd::store(next + t * lanes, Simd::fmadd(c, first, Simd::mul(s, second)));
      Simd::store(next + (half + t) * lanes, Simd::fmsub(c, second, Simd::mul(s, first)));
    }
    float* const swap = now;
    now = next;
    next = swap;
  }
  const uint8_t* source = rotation.source(rotation.layout.rounds);
  for (int k = 0; k < group_size; k += lanes) {
    typename Simd::Float square[lanes];
    for (int i = 0; i < lanes; ++i) square[i] = Simd::load(now + source[k + i] * lanes);
    Simd::transpose(square);
    for (int i = 0; i < lanes; ++i) Simd::store(rows + i * group_size + k, square[i]);
  }
}

template <class Simd>
void finish_f32(const float* row, int group_size, uint32_t* words, float* scale, float* sum) {
  auto total = Simd::zero();
  for (int k = 0; k < group_size; k += Simd::kLanes) {
    const auto v = Simd::load(row + k);
    total = Simd::add(total, v);
    Simd::store_int(words + k, Simd::bits(v));
  }
  *scale = 1.0f;
  *sum = Simd::sum(total);
}

// Format::int8 and Format::int24.
template <class Simd, Format format>
void finish_integer(const float* row, int group_size, uint32_t* words, float* scale, float* sum) {
  constexpr int planes = planes_of(format);
  constexpr float limit = largest_code(format);
  auto largest = Simd::zero();
  auto poison = Simd::zero(); // NaN when any value is not finite, which must reach the output
  for (int k = 0; k < group_size; k += Simd::kLanes) {
    const auto v = Simd::load(row + k);
    largest = Simd::max(largest, Simd::abs(v));
    poison = Simd::fmadd(v, Simd::zero(), poison);
  }
  const float peak = Simd::maximum(largest);
  const auto inverse = Simd::broadcast(peak > kSmallestPeak ? limit / peak : 0.0f);
  auto total = Simd::zero_int();
  for (int k = 0; k < group_size; k += Simd::kLanes) {
    const auto codes = Simd::round(Simd::mul(Simd::load(row + k), inverse));
    total = Simd::add_int(total, codes);
    uint32_t* out = words + k / kChunk * words_per_plane(format);
    if constexpr (planes == 1) {
      Simd::store_int8(out, codes);
    } else {
      const auto digits = Simd::signed_digits(codes);
      const int stride = group_size / kChunk * words_per_plane(format);
      Simd::store_int8(out, Simd::template shift_right<16>(digits));
      Simd::store_int8(out + stride, Simd::template shift_right<8>(digits));
      Simd::store_int8(out + 2 * stride, digits);
    }
  }
  *scale = peak / limit + Simd::sum(poison);
  *sum = static_cast<float>(Simd::sum_int(total));
}

// One group's share in x · downᵀ, for one row after the other; lanes are channels.
template <class Simd>
void project_rows(
    const Projection& to, const float* down, int rank, int group_size, int rows, const float* v, float* parts) {
  for (int r = 0; r < rank; ++r) {
    for (int row = 0; row < rows; ++row) {
      auto dot = Simd::zero();
      for (int k = 0; k < group_size; k += Simd::kLanes) {
        dot = Simd::fmadd(Simd::load(down + r * kMaxGroupSize + k), Simd::load(v + row * group_size + k), dot);
      }
      parts[row * to.rank + r] = Simd::sum(dot);
    }
  }
}

// The same for up to kLanes rows at once; lanes are rows, so that no lanes are added up.
template <class Simd, int kRanks>
void project_lanes(
    const Projection& to, const float* down, int rank, int group_size, int rows, const float* v, float* parts) {
  constexpr int lanes = Simd::kLanes;
  typename Simd::Float sums[kRanks];
#pragma GCC unroll 8
  for (int r = 0; r < kRanks; ++r) sums[r] = Simd::zero();
  for (int k = 0; k < group_size; k += lanes) {
    typename Simd::Float square[lanes];
    for (int i = 0; i < lanes; ++i) square[i] = Simd::load(v + i * group_size + k);
    Simd::transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
#pragma GCC unroll 8
      for (int r = 0; r < kRanks; ++r) {
        sums[r] = Simd::fmadd(Simd::broadcast(down[r * kMaxGroupSize + k + i]), square[i], sums[r]);
      }
    }
  }
  alignas(64) float transposed[kRanks][lanes];
#pragma GCC unroll 8
  for (int r = 0; r < kRanks; ++r) Simd::store(transposed[r], sums[r]);
  for (int row = 0; row < rows; ++row) {
    for (int r = 0; r < rank; ++r) parts[row * to.rank + r] = transposed[r][row];
  }
}

// Projects `rows` rotated rows of one group for the linears that read them; `v` has room for kLanes rows.
template <class Simd>
void project(const PrepareJob& job, int64_t group, int64_t row_begin, int rows, bool many, const float* v) {
  constexpr int kRanks = 8; // at a time
  const int group_size = job.out.group_size;
  for (int i = 0; i < job.projection_count; ++i) {
    const Projection& to = job.projections[i];
    float* parts = to.parts + job.out.row_index(group, row_begin) * to.rank;
    for (int first = 0; first < to.rank; first += kRanks) {
      const int rank = to.rank - first < kRanks ? to.rank - first : kRanks;
      alignas(64) float down[kRanks * kMaxGroupSize];
      for (int r = 0; r < kRanks; ++r) {
        for (int k = 0; k < group_size; k += Simd::kLanes) {
          const int64_t at = (first + r) * to.in_features + group * group_size + k;
          const auto row = r < rank ? Simd::template load_as<DType::f16>(to.down, at) : Simd::zero();
          Simd::store(down + r * kMaxGroupSize + k, row);
        }
      }
      const auto some = many ? project_lanes<Simd, kRanks> : project_rows<Simd>;
      some(to, down, rank, group_size, rows, v, parts + first);
    }
  }
}

// `Isa` names the vectors, rotates one row, and knows how to finish each format.
template <class Isa>
void prepare(const PrepareJob& job, int64_t group, int64_t row_begin, int64_t row_end) {
  using Simd = typename Isa::Simd;
  constexpr int lanes = Simd::kLanes;
  const int group_size = job.out.group_size;
  const int rows = static_cast<int>(row_end - row_begin);
  const RotationLayout layout{group_size, job.rounds};
  const GroupRotation rotation{job.rotation ? job.rotation + group * layout.group_bytes() : nullptr, layout};

  alignas(64) float v[lanes * kMaxGroupSize]; // [row][channel]
  const float* channel_scales = job.rotation ? rotation.channel_scales() : nullptr;
  load_rows<Simd>(job, row_begin * job.row_stride + group * group_size, channel_scales, rows, v);
  if (job.rounds > 0 && rows > Isa::kRowsOneByOne) {
    std::memset(v + rows * group_size, 0, sizeof(float) * (lanes - rows) * group_size);
    rotate_lanes<Simd>(v, rotation);
  } else if (job.rounds > 0) {
    for (int row = 0; row < rows; ++row) Isa::rotate_row(v + row * group_size, rotation);
  }
  project<Simd>(job, group, row_begin, rows, rows > Isa::kRowsOneByOne, v);
  const auto finish = Isa::finish(job.out.format);
  alignas(64) uint32_t line[kMaxGroupSize / 2]; // of Format::bf16_tiles
  for (int row = 0; row < rows; ++row) {
    const int64_t index = job.out.row_index(group, row_begin + row);
    uint32_t* words = job.out.format == Format::bf16_tiles ? line : job.out.row(group, row_begin + row);
    finish(v + row * group_size, group_size, words, job.out.scale + index, job.out.sum + index);
    if (words != line) continue;
    for (int64_t word = 0; word < job.out.row_words(); word += kTileWords) {
      std::memcpy(job.out.in_tile(group, row_begin + row, word), line + word, kTileWords * sizeof(uint32_t));
    }
  }
}

template <class Simd, DType dtype>
void store_rows(const StoreJob& job) {
  constexpr int64_t element = dtype == DType::f32 ? 4 : 2;
  for (int64_t row = 0; row < job.rows; ++row) {
    auto* y = static_cast<uint8_t*>(job.y) + row * job.row_stride * element;
    alignas(64) uint8_t narrow[kBlockColumns * sizeof(float)];
    void* out = job.columns == kBlockColumns ? static_cast<void*>(y) : narrow;
    for (int n = 0; n < kBlockColumns; n += Simd::kLanes) {
      const auto v = Simd::add(Simd::load(job.tile + row * kBlockColumns + n), Simd::load(job.bias + n));
      Simd::template store_as<dtype>(out, n, v);
    }
    if (job.columns < kBlockColumns) std::memcpy(y, narrow, job.columns * element);
  }
}

// tile += sums · up, `kRanks` ranks from `first` on, whose columns stay in registers.
template <class Simd, int kRanks>
void add_ranks(const StoreJob& job, int first) {
  for (int n = 0; n < kBlockColumns; n += Simd::kLanes) {
    typename Simd::Float up[kRanks];
#pragma GCC unroll 4
    for (int r = 0; r < kRanks; ++r) {
      up[r] = Simd::template load_as<DType::f16>(job.up, (first + r) * kBlockColumns + n);
    }
    for (int64_t row = 0; row < job.rows; ++row) {
      const float* sums = job.sums + row * job.rank + first;
      auto v = Simd::load(job.tile + row * kBlockColumns + n);
#pragma GCC unroll 4
      for (int r = 0; r < kRanks; ++r) v = Simd::fmadd(Simd::broadcast(sums[r]), up[r], v);
      Simd::store(job.tile + row * kBlockColumns + n, v);
    }
  }
}

template <class Simd>
void store(const StoreJob& job) {
  int rank = 0;
  for (; rank + 4 <= job.rank; rank += 4) add_ranks<Simd, 4>(job, rank);
  for (; rank < job.rank; ++rank) add_ranks<Simd, 1>(job, rank);
  if (job.dtype == DType::f32) return store_rows<Simd, DType::f32>(job);
  if (job.dtype == DType::bf16) return store_rows<Simd, DType::bf16>(job);
  store_rows<Simd, DType::f16>(job);
}

} // namespace
} // namespace parofx
