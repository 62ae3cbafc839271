// Intel AMX: tiles of 16 rows by 64 bytes, multiplied 16 × 16 × 16 words at a time.
//
// One group of a block is decoded once into the L1 cache as code − zero, exactly, in the order that AMX wants, which is
// that of the steps in multiply_simd.h; the products of all rows follow. The digits of an int24 activation are rows of
// a tile like any other.
//
// Many rows of bf16 take another way, amx_scaled.h's.
#include <sys/syscall.h>
#include <unistd.h>

#include "amx_scaled.h"

namespace parofx {
namespace {

// How codes meet activations. kCentred: the zero point is subtracted when codes are decoded, not from the product.
struct Bf16Tiles {
  static constexpr bool kCentred = true;
  static constexpr int kSteps = words_per_plane(Format::bf16);
  // code + 15 − zero is 0..30 and indexes a table of −15..15.
  static __m512i offset(__m512i zeros) {
    const __m512i shift = _mm512_sub_epi32(_mm512_set1_epi32(15), zeros);
    return _mm512_or_si512(shift, _mm512_slli_epi32(shift, 16));
  }
  static __m512i decode(__m512i words, int step, __m512i offset) {
    const __m512i table = _mm512_set_epi16(
        0, 0x4170, 0x4160, 0x4150, 0x4140, 0x4130, 0x4120, 0x4110, 0x4100, 0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040,
        0x4000, 0x3f80, 0, -0x4080, -0x4000, -0x3fc0, -0x3f80, -0x3f60, -0x3f40, -0x3f20, -0x3f00, -0x3ef0, -0x3ee0,
        -0x3ed0, -0x3ec0, -0x3eb0, -0x3ea0, -0x3e90);
    const __m512i codes = _mm512_and_si512(_mm512_srli_epi32(words, 4 * step), _mm512_set1_epi32(0x000f000f));
    return _mm512_permutexvar_epi16(_mm512_add_epi16(codes, offset), table);
  }
  static __m512 load(const void* product) { return _mm512_load_ps(product); }
  static void multiply_first() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  static void multiply_second() {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
};

struct Int8Tiles {
  static constexpr bool kCentred = true;
  static constexpr int kSteps = words_per_plane(Format::int8);
  static __m512i offset(__m512i zeros) { return _mm512_mullo_epi32(zeros, _mm512_set1_epi32(0x01010101)); }
  static __m512i decode(__m512i words, int step, __m512i offset) {
    const __m512i codes = _mm512_and_si512(_mm512_srli_epi16(words, 4 * step), _mm512_set1_epi8(15));
    return _mm512_sub_epi8(codes, offset);
  }
  static __m512 load(const void* product) { return _mm512_cvtepi32_ps(_mm512_load_si512(product)); }
  static void multiply_first() {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
  }
  static void multiply_second() {
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
};

// 8-bit codes are in tile order as they are stored.
struct ByteTiles {
  static constexpr bool kCentred = false;
  static constexpr int kSteps = words_per_plane(Format::int8);
  static __m512 load(const void* product) { return Int8Tiles::load(product); }
  static void multiply_first() {
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
  }
  static void multiply_second() {
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
};

// Decodes one group of a block: rows of 32 words, one for each step.
template <class Tiles>
void decode_group(const MultiplyJob& job, int64_t group, int chunks, uint32_t* out) {
  const uint8_t* weight = job.bits == 3 ? widen_planes<Simd512>(job, group)
                                        : job.block.weight + group * chunks * kBlockColumns * sizeof(uint32_t);
  const uint8_t* zeros = job.block.zeros + group * kBlockColumns;
  const int64_t ahead = prefetch_distance(job);
  const auto offset_of = [&](int half) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros + half * 16));
    return Tiles::offset(_mm512_cvtepu8_epi32(bytes));
  };
  const __m512i offsets[2] = {offset_of(0), offset_of(1)};
  for (int chunk = 0; chunk < chunks; ++chunk) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const uint8_t* from = weight + chunk * kBlockColumns * sizeof(uint32_t) + half * 64;
      const __m512i words = _mm512_loadu_si512(from);
      Simd512::prefetch(from + ahead);
#pragma GCC unroll 4
      for (int step = 0; step < Tiles::kSteps; ++step) {
        uint32_t* to = out + (chunk * Tiles::kSteps + step) * kBlockColumns + half * 16;
        _mm512_store_si512(to, Tiles::decode(words, step, offsets[half]));
      }
    }
  }
}

// Products of 32 columns with 16 or, kPair, 32 lines of activation words of one group, into (32, 32) words.
template <class Tiles, bool kPair>
void multiply_tiles(const uint32_t* x, int64_t line_words, const void* codes, uint32_t* product) {
  const int64_t line_bytes = line_words * sizeof(uint32_t);
  constexpr int64_t code_bytes = kBlockColumns * sizeof(uint32_t);
  // gcc does not know that tile loads read memory.
  __asm__ volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t word = 0; word < line_words; word += kTileWords) {
    const auto* from = static_cast<const uint32_t*>(codes) + word * kBlockColumns;
    _tile_loadd(6, from, code_bytes);
    _tile_loadd(7, from + 16, code_bytes);
    _tile_loadd(4, x + word, line_bytes);
    Tiles::multiply_first();
    if constexpr (kPair) {
      _tile_loadd(5, x + kTileRows * line_words + word, line_bytes);
      Tiles::multiply_second();
    }
  }
  _tile_stored(0, product, code_bytes);
  _tile_stored(1, product + 16, code_bytes);
  if constexpr (kPair) {
    _tile_stored(2, product + kTileRows * kBlockColumns, code_bytes);
    _tile_stored(3, product + kTileRows * kBlockColumns + 16, code_bytes);
  }
}

// Returns one group's codes. Tiles read what has reached the cache: decoding the next group now gives its stores time.
template <class Tiles>
const void* decode_ahead(const MultiplyJob& job, int64_t group) {
  const int chunks = job.activation->group_size / kChunk;
  const auto buffer = [&](int64_t which) { return job.unpacked + which % 2 * chunks * Tiles::kSteps * kBlockColumns; };
  if (group == 0) decode_group<Tiles>(job, 0, chunks, buffer(0));
  if (group + 1 < job.activation->groups) decode_group<Tiles>(job, group + 1, chunks, buffer(group + 1));
  return buffer(group);
}

template <>
const void* decode_ahead<ByteTiles>(const MultiplyJob& job, int64_t group) {
  return job.block.weight + group * job.activation->group_size * kBlockColumns;
}

// tile += scale · step · (product − zero · sum), for the rows of one group whose products are at hand.
template <class Tiles>
void fold(const MultiplyJob& job, int64_t group, int64_t row, int64_t rows, const uint32_t* product) {
  const Activation& activation = *job.activation;
  const int planes = planes_of(activation.format);
  const int64_t first = activation.row_index(group, job.row_begin + row);
  for (int half = 0; half < 2; ++half) {
    const int64_t column = group * kBlockColumns + half * 16;
    const __m512 scale = Simd512::load_as<DType::f16>(job.block.scales, column);
    const __m512 zero = Simd512::load_bytes(job.block.zeros + column);
    for (int64_t i = 0; i < rows; ++i) {
      const uint32_t* from = product + i * planes * kBlockColumns + half * 16;
      __m512 value = Tiles::load(from);
      for (int plane = 1; plane < planes; ++plane) {
        value = _mm512_fmadd_ps(value, _mm512_set1_ps(kPlaneBase), Tiles::load(from + plane * kBlockColumns));
      }
      if constexpr (!Tiles::kCentred) value = _mm512_fnmadd_ps(zero, _mm512_set1_ps(activation.sum[first + i]), value);
      float* to = job.tile + (row + i) * kBlockColumns + half * 16;
      const __m512 scaled = _mm512_mul_ps(scale, _mm512_set1_ps(activation.scale[first + i]));
      Simd512::store(to, _mm512_fmadd_ps(value, scaled, Simd512::load(to)));
    }
  }
}

template <class Tiles>
void multiply_with_tiles(const MultiplyJob& job) {
  const Activation& activation = *job.activation;
  const int planes = planes_of(activation.format);
  const int64_t line_words = activation.group_size / kChunk * Tiles::kSteps;
  const int64_t rows_at_once = 2 * kTileRows / planes;
  alignas(64) uint32_t product[2 * kTileRows * kBlockColumns];
  configure_tiles(line_words);
  std::memset(job.tile, 0, sizeof(float) * job.row_count * kBlockColumns);
  for (int64_t group = 0; group < activation.groups; ++group) {
    const void* codes = decode_ahead<Tiles>(job, group);
    for (int64_t row = 0; row < job.row_count; row += rows_at_once) {
      const int64_t left = job.row_count - row;
      const int64_t rows = left < rows_at_once ? left : rows_at_once;
      const uint32_t* x = activation.row(group, job.row_begin + row);
      if (rows * planes > kTileRows) {
        multiply_tiles<Tiles, true>(x, line_words, codes, product);
      } else {
        multiply_tiles<Tiles, false>(x, line_words, codes, product);
      }
      fold<Tiles>(job, group, row, rows, product);
    }
  }
  _tile_release();
}

// Below these numbers of rows the vector kernels, or int24 for bf16, are faster.
constexpr int64_t kRowsForInt8 = 4;
constexpr int64_t kRowsForInt24 = 2;
constexpr int64_t kRowsForBf16 = 12;
// From so many rows on, bf16 weights are scaled and rounded when they are decoded.
constexpr int64_t kRowsForScaled = 64;
// From so many, that is faster than int8, whose sums have to be scaled.
constexpr int64_t kRowsBeyondInt8 = 256;

Format choose_format(DType dtype, bool dynamic_int8, int64_t rows, int bits) {
  const bool is_bf16 = dtype == DType::bf16 && bits != 8;
  if (dynamic_int8 && !(is_bf16 && rows >= kRowsBeyondInt8)) return Format::int8;
  if (!is_bf16 || rows < kRowsForBf16) return Format::int24;
  return rows < kRowsForScaled ? Format::bf16 : Format::bf16_tiles;
}

Blocking blocking(const Activation& activation) {
  return activation.format == Format::bf16_tiles ? scaled_blocking(activation) : all_groups(activation);
}

void prepare(const PrepareJob& job, int64_t group, int64_t row_begin, int64_t row_end) {
  kAvx512Bf16Kernels.prepare(job, group, row_begin, row_end);
}

void multiply(const MultiplyJob& job) {
  const Format format = job.activation->format;
  if (format == Format::bf16_tiles) return multiply_scaled(job);
  if (format == Format::bf16) return multiply_with_tiles<Bf16Tiles>(job);
  if (job.row_count < (format == Format::int8 ? kRowsForInt8 : kRowsForInt24)) return kAvx512Bf16Kernels.multiply(job);
  if (job.bits == 8) return multiply_with_tiles<ByteTiles>(job);
  multiply_with_tiles<Int8Tiles>(job);
}

void store(const StoreJob& job) { kAvx512Bf16Kernels.store(job); }

void round_columns(const ColumnsJob& job, int64_t first_row, int row_count) {
  kAvx512Bf16Kernels.round_columns(job, first_row, row_count);
}

void dense_rounds(const DenseRoundsJob& job, int64_t group, float* workspace) {
  kAvx512Bf16Kernels.dense_rounds(job, group, workspace);
}

} // namespace

bool enable_amx() {
  constexpr long kRequestPermission = 0x1023; // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;              // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

const Kernels kAmxKernels = {
    "amx", kAvx512Bf16Kernels.row_tile, choose_format, blocking, prepare, multiply, store, round_columns, dense_rounds};

} // namespace parofx
