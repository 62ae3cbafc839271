// The product of one block of 32 columns, written once for every vector width, activation format and width of codes.
//
// A `Dot` decodes step s of a chunk of eight codes and multiplies it with 32 bits of activation:
//   kSteps            steps in a chunk, equal to words_per_plane of its format
//   kPlanes           digits of an activation, equal to planes_of its format
//   kDirectRows       most rows that read the codes straight from memory; more first decode a group into the L1 cache
//   kTileRows         most rows multiplied at a time from there
//   Weights decode<bits>(words, s)   the codes of step s, one 32-bit element per column, of bits/4 words per column;
//                 3-bit codes have become 4-bit ones before
//   Acc mac(acc, weights, x)      acc + weights · x, x being one activation word in every lane
//   Acc join(a, b), Float result(acc)
#pragma once

#include "numeric.h"
#include "planes_simd.h"

namespace parofx {
namespace {

// The group size is a constant, so that every row of a tile is a fixed offset from the first.
template <class Simd, class Dot, int kBits, int kGroupSize>
class Multiply {
  using Float = typename Simd::Float;
  using Int = typename Simd::Int;
  using Acc = typename Dot::Acc;
  static constexpr int kVectors = kBlockColumns / Simd::kLanes;
  static constexpr int kSteps = Dot::kSteps;
  static constexpr int kHalfTile = (Dot::kTileRows + 1) / 2;
  static constexpr int kChunks = kGroupSize / kChunk;
  static constexpr int kPlaneWords = kChunks * kSteps;
  static constexpr int kPlanes = Dot::kPlanes;
  static constexpr int kRowWords = kPlanes * kPlaneWords;
  static constexpr int kWords = kBits / 4; // of a column and chunk
  static constexpr int kWordBytes = kBlockColumns * sizeof(uint32_t);
  static constexpr int kChunkBytes = kWords * kWordBytes;
  // Cutting more than kDirectRows rows into nearly equal tiles leaves none smaller than this.
  static constexpr int kSmallestTile = kHalfTile <= Dot::kDirectRows ? kHalfTile : Dot::kDirectRows + 1;

 public:
  static void run(const MultiplyJob& job) {
    if (job.row_count <= Dot::kDirectRows) return direct<Dot::kDirectRows>(job);
    std::memset(job.tile, 0, sizeof(float) * job.row_count * kBlockColumns);
    for (int64_t group = 0; group < job.activation->groups; ++group) {
      unpack(weight_of(job, group), prefetch_distance(job), job.unpacked);
      tiles(job, group);
    }
  }

 private:
  static const uint8_t* weight_of(const MultiplyJob& job, int64_t group) {
    if (kBits == 4 && job.bits == 3) return widen_planes<Simd>(job, group);
    return job.block.weight + group * kChunks * kChunkBytes;
  }

  static const uint32_t* row_of(const MultiplyJob& job, int64_t group, int64_t row) {
    return job.activation->words + job.activation->row_index(group, job.row_begin + row) * kRowWords;
  }

  [[gnu::always_inline]] static void load_chunk(const uint8_t* weight, int vector, Int (&words)[kWords]) {
#pragma GCC unroll 2
    for (int i = 0; i < kWords; ++i) words[i] = Simd::load_int(weight + i * kWordBytes + vector * sizeof(Int));
  }

  [[gnu::always_inline]] static void prefetch_chunk(const uint8_t* ahead) {
#pragma GCC unroll 4
    for (int i = 0; i < kChunkBytes; i += 64) Simd::prefetch(ahead + i);
  }

  // total += scale · step · (dot − zero · sum), with one product per plane.
  [[gnu::always_inline]] static void fold(
      const MultiplyJob& job, int64_t group, int64_t row, const Acc (*products)[kVectors], Float (&total)[kVectors]) {
    const int64_t index = job.activation->row_index(group, job.row_begin + row);
    const Float sum = Simd::broadcast(job.activation->sum[index]);
    const Float step = Simd::broadcast(job.activation->scale[index]);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      const int64_t column = group * kBlockColumns + i * Simd::kLanes;
      const Float scale = Simd::mul(step, Simd::template load_as<DType::f16>(job.block.scales, column));
      Float dot = Dot::result(products[0][i]);
#pragma GCC unroll 3
      for (int plane = 1; plane < kPlanes; ++plane) {
        dot = Simd::fmadd(dot, Simd::broadcast(kPlaneBase), Dot::result(products[plane][i]));
      }
      const Float centred = Simd::fnmadd(Simd::load_bytes(job.block.zeros + column), sum, dot);
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
    constexpr int kLines = kRows * kPlanes; // of activation words
    // With few of them, several sums per column keep the multipliers busy for the length of their pipeline.
    constexpr int kWanted = kLines * kVectors >= 8 ? 1 : kLines * kVectors >= 4 ? 2 : 4;
    constexpr int kSums = kWanted < kSteps ? kWanted : kSteps;
    const uint8_t* weight = weight_of(job, group);
    const int64_t ahead = prefetch_distance(job);
    const uint32_t* x = row_of(job, group, 0);
    Acc acc[kLines][kVectors][kSums];
#pragma GCC unroll 64
    for (int i = 0; i < kLines * kVectors * kSums; ++i) (&acc[0][0][0])[i] = Dot::zero();
    for (int chunk = 0; chunk < kChunks; ++chunk, weight += kChunkBytes) {
      Int words[kVectors][kWords];
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) load_chunk(weight, i, words[i]);
      prefetch_chunk(weight + ahead);
#pragma GCC unroll 8
      for (int step = 0; step < kSteps; ++step) {
        typename Dot::Weights codes[kVectors];
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) codes[i] = Dot::template decode<kBits>(words[i], step);
#pragma GCC unroll 8
        for (int line = 0; line < kLines; ++line) {
          const Int v = Simd::broadcast_word(x + line * kPlaneWords + chunk * kSteps + step);
#pragma GCC unroll 4
          for (int i = 0; i < kVectors; ++i) {
            acc[line][i][step % kSums] = Dot::mac(acc[line][i][step % kSums], codes[i], v);
          }
        }
      }
    }
    Acc products[kLines][kVectors];
#pragma GCC unroll 8
    for (int line = 0; line < kLines; ++line) {
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        products[line][i] = acc[line][i][0];
#pragma GCC unroll 8
        for (int part = 1; part < kSums; ++part) products[line][i] = Dot::join(products[line][i], acc[line][i][part]);
      }
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) fold(job, group, row, products + row * kPlanes, totals[row]);
  }

  static void unpack(const uint8_t* weight, int64_t ahead, uint32_t* out) {
    for (int chunk = 0; chunk < kChunks; ++chunk, weight += kChunkBytes) {
      prefetch_chunk(weight + ahead);
      for (int i = 0; i < kVectors; ++i) {
        Int words[kWords];
        load_chunk(weight, i, words);
#pragma GCC unroll 8
        for (int step = 0; step < kSteps; ++step) {
          uint32_t* to = out + (chunk * kSteps + step) * kBlockColumns + i * Simd::kLanes;
          Simd::store_int(to, Dot::template decode<kBits>(words, step));
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
    constexpr int kLines = kRows * kPlanes;
    const uint32_t* x = row_of(job, group, begin);
    Acc acc[kLines][kVectors];
#pragma GCC unroll 64
    for (int i = 0; i < kLines * kVectors; ++i) (&acc[0][0])[i] = Dot::zero();
    for (int step = 0; step < kPlaneWords; ++step) {
      typename Dot::Weights codes[kVectors];
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        codes[i] = Simd::load_int(job.unpacked + step * kBlockColumns + i * Simd::kLanes);
      }
#pragma GCC unroll 16
      for (int line = 0; line < kLines; ++line) {
        const Int v = Simd::broadcast_word(x + line * kPlaneWords + step);
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) acc[line][i] = Dot::mac(acc[line][i], codes[i], v);
      }
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      float* tile = job.tile + (begin + row) * kBlockColumns;
      Float total[kVectors];
      for (int i = 0; i < kVectors; ++i) total[i] = Simd::load(tile + i * Simd::kLanes);
      fold(job, group, begin + row, acc + row * kPlanes, total);
      for (int i = 0; i < kVectors; ++i) Simd::store(tile + i * Simd::kLanes, total[i]);
    }
  }
};

template <class Simd, class Dot, int kBits>
void multiply_with(const MultiplyJob& job) {
  switch (job.activation->group_size) {
    case 32: return Multiply<Simd, Dot, kBits, 32>::run(job);
    case 64: return Multiply<Simd, Dot, kBits, 64>::run(job);
    default: return Multiply<Simd, Dot, kBits, 128>::run(job);
  }
}

} // namespace
} // namespace parofx
