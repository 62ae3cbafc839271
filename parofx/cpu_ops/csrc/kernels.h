// What an instruction set provides: three functions on one piece of a linear, which activation format it wants, and
// what calibration does most.
// Every function is single-threaded, allocates nothing and throws nothing: linear.cpp and calibration.cpp split the
// work.
#pragma once

#include <cstdint>

#include "layout.h"

namespace parofx {

enum class DType { f32, bf16, f16 };

// How a rotated activation waits for the product. One (row, group) is a run of 32-bit words, ordered so that word s
// of a chunk of 8 channels meets the weight codes that the same kernel decodes in step s:
//   f32   8 words a chunk, word j = channel j
//   bf16  4 words a chunk, word j = channels (j, j+4)
//   bf16_tiles  as bf16, but kTileRows rows lie together, in tiles of kTileWords words of each of them
//   int8  2 words a chunk, word j = channels (j, j+2, j+4, j+6), symmetric, one scale per (row, group)
//   int24 as int8, but a run for each of three digits, so that the step is 2^-16 as large: at most 2^-24 of the
//         group's largest value is lost, which is what fp32 sums lose, and products are those of int8
enum class Format { f32, bf16, bf16_tiles, int8, int24 };

// Runs ("planes") of a row, the most significant first; each counts kPlaneBase times the next.
constexpr int planes_of(Format format) { return format == Format::int24 ? 3 : 1; }
constexpr float kPlaneBase = 256.0f;

constexpr int words_per_plane(Format format) {
  if (format == Format::f32) return 8;
  return format == Format::bf16 || format == Format::bf16_tiles ? 4 : 2;
}
constexpr int words_per_chunk(Format format) { return planes_of(format) * words_per_plane(format); }

constexpr int kTileRows = 16;
constexpr int kTileWords = 16;

// Kernels may read, and ignore, as many rows past the last; `MultiplyJob::tile` has room for as many more.
constexpr int kPaddingRows = 32;

// Rotated activations of one distinct rotation: words [G][rows][g/8 · words_per_chunk], scale and sum [G][rows].
// `sum` is the sum of the stored values, which the zero point multiplies; `scale` is 1 unless they are integers.
struct Activation {
  Format format;
  int group_size;
  int64_t rows;
  int64_t groups;
  uint32_t* words;
  float* scale;
  float* sum;

  int64_t row_words() const { return group_size / kChunk * words_per_chunk(format); }
  int64_t row_index(int64_t group, int64_t row) const { return group * rows + row; }
  uint32_t* row(int64_t group, int64_t row) const { return words + row_index(group, row) * row_words(); }
  // bf16_tiles: where words `word`.. of `row` are; `rows` is a multiple of kTileRows, `word` of kTileWords.
  uint32_t* in_tile(int64_t group, int64_t row, int64_t word) const {
    return this->row(group, row / kTileRows * kTileRows) + word * kTileRows + row % kTileRows * kTileWords;
  }
};

// The lower half of a low-rank correction: what a linear projects rotated activations on, group by group.
struct Projection {
  const uint16_t* down; // fp16 [rank][K]
  int64_t in_features;
  int rank;
  float* parts; // out: [G][rows][rank], the groups' shares of x · downᵀ
};

struct PrepareJob {
  const void* x; // (rows, K), unit stride along K
  int64_t row_stride;
  DType dtype;
  const uint8_t* rotation; // null: neither scales nor rotation
  int rounds;
  Activation out;
  const Projection* projections; // of the linears that read this rotation
  int projection_count;
};

// One full-width block of one linear. Narrow last blocks are copied to full width by the caller.
struct Block {
  const uint8_t* weight;
  const uint16_t* scales;
  const uint8_t* zeros;
};

// How far ahead of the reader weights are fetched, into the L2 cache and then into the L1 cache. Few misses of the L1
// cache can wait for memory at a time; more can where they only wait for L2.
constexpr int kPrefetchBytes = 4096;
constexpr int kNearBytes = 1024;

constexpr int64_t kUnpackedWords = int64_t{kBlockColumns} * kMaxGroupSize;

// How much of the activations one block after the other meets before the next part's turn, so that it stays in the
// cache meanwhile: at most so many rows, and groups.
struct Blocking {
  int64_t rows;
  int64_t row_multiple; // of which parts consist, but for the last
  int64_t groups;
};

// 256 rows of fp32 outputs (32 KiB) stay in the L1 cache beside an unpacked group.
inline Blocking all_groups(const Activation& activation) { return {256, 1, activation.groups}; }

struct MultiplyJob {
  const Activation* activation;
  Block block;
  int bits; // 3, 4 or 8
  int64_t row_begin;
  int64_t row_count;
  int64_t group_begin;
  int64_t group_end;
  float* tile;        // out: (row_count, 32), row_begin's row first; added to unless group_begin is 0
  uint32_t* unpacked; // workspace of kUnpackedWords
  uint8_t* nibbles;   // with 3 bits: workspace of 16 · g bytes
};

struct StoreJob {
  float* tile; // (rows, 32); overwritten
  int64_t rows;
  int columns;       // 1..32
  const float* bias; // 32 floats
  // The upper half of a low-rank correction, added as sums · up; none has rank 0.
  int rank;
  const float* sums;  // (rows, rank)
  const uint16_t* up; // fp16 (rank, 32)
  DType dtype;
  void* y; // first element of the block's first row
  int64_t row_stride;
};

// One block of a weight's columns, one after the other: calibration's error feedback (GPTQ) and coordinate descent.
// Weights are channels first, (K, N), and rows of the model's weight, N, lie side by side. What the columns d before a
// column c changed moves it by Σ_d coupling[c][d] · change[d]; its steps (codes minus zeros) and change are
//   feedback  clamp(round((base[c] + …) / scale)), exact[c] − steps · scale; the last column comes first
//   descent   clamp(round(steps + (base[c] + …) / (scale · curvature[c]))), what it moved the weight by
struct ColumnsJob {
  int columns; // of the block
  int64_t rows; // N
  int64_t group_size;
  const int64_t* channels; // of the columns, among the K
  const float* base; // (columns, N)
  const float* exact; // (columns, N); feedback alone
  const float* coupling; // (columns, columns)
  const float* curvature; // (columns); null: feedback
  const float* scales; // (K/g, N), as `low` and `high`, the ends of what steps may be
  const float* low;
  const float* high;
  float* steps; // (K, N), in and out
  float* changes; // out: (columns, N)
};

constexpr int kColumnsAtMost = 128; // in a block
constexpr int kRowsOfColumns = 64; // of one call

// The rounds of a rotation applied to the identity of every group, or the gradient for that. With a channel's partner p
//   forward   after[r][c] = cosines[r][c] · after[r − 1][c] + sines[r][c] · after[r − 1][p]
//   backward  crossed[r][c] = Σ after[r][p] · grad[c], then grad[c] = cosines[r][c] · grad[c] − sines[r][c] · grad[p]
struct DenseRoundsJob {
  int rounds;
  int group_size; // a multiple of 16
  int64_t in_features;
  const int64_t* partners; // (rounds, K), inside the group
  const float* cosines; // (rounds, K)
  const float* sines; // (rounds, K)
  float* after; // (rounds, K, g), out, or in for the gradient
  const float* grad; // (K, g); null: forward
  float* crossed; // out: (rounds, K)

  // Floats that one call needs to itself.
  int64_t workspace_size() const { return grad ? int64_t{2} * group_size * group_size : 0; }
};

struct Kernels {
  const char* isa;
  int row_tile; // rows that one call of `prepare` handles best
  // The format for activations of `dtype` that meet weights of `bits`; dynamic_int8 asks for int8.
  Format (*format)(DType dtype, bool dynamic_int8, int64_t rows, int bits);
  Blocking (*blocking)(const Activation& activation);
  void (*prepare)(const PrepareJob& job, int64_t group, int64_t row_begin, int64_t row_end);
  void (*multiply)(const MultiplyJob& job);
  void (*store)(const StoreJob& job);
  void (*round_columns)(const ColumnsJob& job, int64_t first_row, int row_count);
  void (*dense_rounds)(const DenseRoundsJob& job, int64_t group, float* workspace);
};

extern const Kernels kScalarKernels;
#if defined(PAROFX_X86)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;
extern const Kernels kAmxKernels;
bool enable_amx(); // asks the operating system for the tile registers
#endif

// The fastest kernels this machine runs, or those that PAROFX_CPU_ISA names. Throws std::runtime_error for a name
// that is unknown or that this machine lacks.
const Kernels& active_kernels();

} // namespace parofx
