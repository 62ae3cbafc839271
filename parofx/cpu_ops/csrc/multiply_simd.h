// The int4 product of one block of 32 columns, written once for every vector width and activation format.
//
// A `Dot` decodes step s of a word of eight codes and multiplies it with 32 bits of activation:
//   kSteps            steps in a word, equal to words_per_chunk of its format
//   Weights decode(words, s)      the codes of step s, one 32-bit element per column
//   Acc mac(acc, weights, x)      acc + weights · x, x being one activation word in every lane
//   Acc join(a, b), Float result(acc)
// Few rows read the codes straight from memory. More rows first decode one group into the L1 cache.
#pragma once

#include "numeric.h"

namespace parofx {
namespace {

// How far ahead of the reader the weights are fetched.
constexpr int kPrefetchBytes = 4096;

// The group size is a constant, so that every row of a tile is a fixed offset from the first.
template <class Simd, class Dot, int kGroupSize>
class Multiply {
  using Float = typename Simd::Float;
  using Int = typename Simd::Int;
  using Acc = typename Dot::Acc;
  static constexpr int kVectors = kBlockColumns / Simd::kLanes;
  static constexpr int kSteps = Dot::kSteps;
  static constexpr int kHalfTile = (Dot::kTileRows + 1) / 2;
  static constexpr int kChunks = kGroupSize / kChunk;
  static constexpr int kRowWords = kChunks * kSteps;
  static constexpr int kChunkBytes = kBlockColumns * sizeof(uint32_t);
  // Cutting more than kDirectRows rows into nearly equal tiles leaves none smaller than this.
  static constexpr int kSmallestTile = kHalfTile <= Dot::kDirectRows ? kHalfTile : Dot::kDirectRows + 1;

 public:
  static void run(const MultiplyJob& job) {
    if (job.row_count <= Dot::kDirectRows) return direct<Dot::kDirectRows>(job);
    std::memset(job.tile, 0, sizeof(float) * job.row_count * kBlockColumns);
    for (int64_t group = 0; group < job.activation->groups; ++group) {
      unpack(weight_of(job, group), job.unpacked);
      tiles(job, group);
    }
  }

 private:
  static const uint8_t* weight_of(const MultiplyJob& job, int64_t group) {
    return job.block.weight + group * kChunks * kChunkBytes;
  }

  static const uint32_t* row_of(const MultiplyJob& job, int64_t group, int64_t row) {
    return job.activation->words + job.activation->row_index(group, job.row_begin + row) * kRowWords;
  }

  // total += scale · step · (dot − zero · sum)
  [[gnu::always_inline]] static void fold(
      const MultiplyJob& job, int64_t group, int64_t row, const Acc (&dot)[kVectors], Float (&total)[kVectors]) {
    const int64_t index = job.activation->row_index(group, job.row_begin + row);
    const Float sum = Simd::broadcast(job.activation->sum[index]);
    const Float step = Simd::broadcast(job.activation->scale[index]);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      const int64_t column = group * kBlockColumns + i * Simd::kLanes;
      const Float scale = Simd::mul(step, Simd::template load_as<DType::f16>(job.block.scales, column));
      const Float centred = Simd::fnmadd(Simd::load_bytes(job.block.zeros + column), sum, Dot::result(dot[i]));
      total[i] = Simd::fmadd(centred, scale, total[i]);
    }
  }

  template <int kRows>
  static void direct(const MultiplyJob& job) {
    if (job.row_count < kRows) {
      if constexpr (kRows > 1) direct<kRows - 1>(job);
      return;
    }
    Float totals[kRows][kVectors];
#pragma GCC unroll 64
    for (int i = 0; i < kRows * kVectors; ++i) (&totals[0][0])[i] = Simd::zero();
    for (int64_t group = 0; group < job.activation->groups; ++group) direct_group<kRows>(job, group, totals);
    for (int i = 0; i < kRows * kVectors; ++i) Simd::store(job.tile + i * Simd::kLanes, (&totals[0][0])[i]);
  }

  template <int kRows>
  [[gnu::always_inline]] static void direct_group(
      const MultiplyJob& job, int64_t group, Float (&totals)[kRows][kVectors]) {
    // With few rows, several sums per column keep the multipliers busy for the length of their pipeline.
    constexpr int kWanted = kRows * kVectors >= 8 ? 1 : 8 / (kRows * kVectors);
    constexpr int kSums = kWanted < kSteps ? kWanted : kSteps;
    const uint8_t* weight = weight_of(job, group);
    const uint32_t* x = row_of(job, group, 0);
    Acc acc[kRows][kVectors][kSums];
#pragma GCC unroll 64
    for (int i = 0; i < kRows * kVectors * kSums; ++i) (&acc[0][0][0])[i] = Dot::zero();
#pragma GCC unroll 2
    for (int chunk = 0; chunk < kChunks; ++chunk, weight += kChunkBytes) {
      Int words[kVectors];
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) words[i] = Simd::load_int(weight + i * sizeof(Int));
      Simd::prefetch(weight + kPrefetchBytes);
      Simd::prefetch(weight + kPrefetchBytes + 64);
#pragma GCC unroll 8
      for (int step = 0; step < kSteps; ++step) {
        typename Dot::Weights codes[kVectors];
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) codes[i] = Dot::decode(words[i], step);
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) {
          const Int v = Simd::broadcast_word(x + row * kRowWords + chunk * kSteps + step);
#pragma GCC unroll 4
          for (int i = 0; i < kVectors; ++i) {
            acc[row][i][step % kSums] = Dot::mac(acc[row][i][step % kSums], codes[i], v);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      Acc dot[kVectors];
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        dot[i] = acc[row][i][0];
#pragma GCC unroll 8
        for (int part = 1; part < kSums; ++part) dot[i] = Dot::join(dot[i], acc[row][i][part]);
      }
      fold(job, group, row, dot, totals[row]);
    }
  }

  static void unpack(const uint8_t* weight, uint32_t* out) {
    for (int chunk = 0; chunk < kChunks; ++chunk, weight += kChunkBytes) {
      Simd::prefetch(weight + kPrefetchBytes);
      Simd::prefetch(weight + kPrefetchBytes + 64);
      for (int i = 0; i < kVectors; ++i) {
        const Int words = Simd::load_int(weight + i * sizeof(Int));
#pragma GCC unroll 8
        for (int step = 0; step < kSteps; ++step) {
          Simd::store_int(
              out + (chunk * kSteps + step) * kBlockColumns + i * Simd::kLanes, Dot::decode(words, step));
        }
      }
    }
  }

  // Cuts the rows into the fewest tiles and makes those nearly equal.
  static void tiles(const MultiplyJob& job, int64_t group) {
    const int64_t count = (job.row_count + Dot::kTileRows - 1) / Dot::kTileRows;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t begin = job.row_count * i / count;
      tile<Dot::kTileRows>(job, group, begin, job.row_count * (i + 1) / count - begin);
    }
  }

  template <int kRows>
  static void tile(const MultiplyJob& job, int64_t group, int64_t begin, int64_t rows) {
    if (rows < kRows) {
      if constexpr (kRows > kSmallestTile) tile<kRows - 1>(job, group, begin, rows);
      return;
    }
    const uint32_t* x = row_of(job, group, begin);
    Acc acc[kRows][kVectors];
#pragma GCC unroll 64
    for (int i = 0; i < kRows * kVectors; ++i) (&acc[0][0])[i] = Dot::zero();
    for (int step = 0; step < kRowWords; ++step) {
      typename Dot::Weights codes[kVectors];
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        codes[i] = Simd::load_int(job.unpacked + step * kBlockColumns + i * Simd::kLanes);
      }
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) {
        const Int v = Simd::broadcast_word(x + row * kRowWords + step);
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) acc[row][i] = Dot::mac(acc[row][i], codes[i], v);
      }
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      float* tile = job.tile + (begin + row) * kBlockColumns;
      Float total[kVectors];
      for (int i = 0; i < kVectors; ++i) total[i] = Simd::load(tile + i * Simd::kLanes);
      fold(job, group, begin + row, acc[row], total);
      for (int i = 0; i < kVectors; ++i) Simd::store(tile + i * Simd::kLanes, total[i]);
    }
  }
};

template <class Simd, class Dot>
void multiply_with(const MultiplyJob& job) {
  switch (job.activation->group_size) {
    case 32: return Multiply<Simd, Dot, 32>::run(job);
    case 64: return Multiply<Simd, Dot, 64>::run(job);
    default: return Multiply<Simd, Dot, 128>::run(job);
  }
}

} // namespace
} // namespace parofx
