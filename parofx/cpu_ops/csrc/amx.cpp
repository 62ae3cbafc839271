// Intel AMX: tiles of 16 rows by 64 bytes, multiplied 16 × 16 × 16 words at a time.
//
// One group of a block is decoded once into the L1 cache as code − zero, exactly, in the order that AMX wants, which is
// that of the steps in multiply_simd.h; the products of all rows follow. An activation becomes a sum of bf16 planes
// (one for bf16, two for fp16, three for fp32), so that fp16 and fp32 lose nothing to the tiles.
#include <sys/syscall.h>
#include <unistd.h>

#include "simd512.h"

namespace parofx {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileWords = 16; // 32-bit words in a tile's row

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

struct Bf16Tiles {
  static constexpr int kSteps = words_per_chunk(Format::bf16);
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
  static constexpr int kSteps = words_per_chunk(Format::int8);
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

// Decodes one group of a block: rows of 32 words, one for each step.
template <class Tiles>
void decode_group(const Block& block, int64_t group, int chunks, uint32_t* out) {
  const uint8_t* weight = block.weight + group * chunks * kBlockColumns * sizeof(uint32_t);
  const uint8_t* zeros = block.zeros + group * kBlockColumns;
  for (int half = 0; half < 2; ++half) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros + half * 16));
    const __m512i offset = Tiles::offset(_mm512_cvtepu8_epi32(bytes));
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const uint8_t* from = weight + chunk * kBlockColumns * sizeof(uint32_t) + half * 64;
      const __m512i words = _mm512_loadu_si512(from);
      Simd512::prefetch(from + 4096);
#pragma GCC unroll 4
      for (int step = 0; step < Tiles::kSteps; ++step) {
        uint32_t* to = out + (chunk * Tiles::kSteps + step) * kBlockColumns + half * 16;
        _mm512_store_si512(to, Tiles::decode(words, step, offset));
      }
    }
  }
}

// Products of 32 columns with 16 or, kPair, 32 rows of one group, into (32, 32) words.
template <class Tiles, bool kPair>
void multiply_tiles(const uint32_t* x, int64_t row_words, int planes, const uint32_t* codes, uint32_t* product) {
  const int64_t row_bytes = row_words * sizeof(uint32_t);
  const int64_t plane_words = row_words / planes;
  constexpr int64_t code_bytes = kBlockColumns * sizeof(uint32_t);
  // gcc does not know that tile loads read memory.
  __asm__ volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t word = 0; word < plane_words; word += kTileWords) {
    _tile_loadd(6, codes + word * kBlockColumns, code_bytes);
    _tile_loadd(7, codes + word * kBlockColumns + 16, code_bytes);
    for (int plane = 0; plane < planes; ++plane) {
      const uint32_t* from = x + plane * plane_words + word;
      _tile_loadd(4, from, row_bytes);
      Tiles::multiply_first();
      if constexpr (kPair) {
        _tile_loadd(5, from + kTileRows * row_words, row_bytes);
        Tiles::multiply_second();
      }
    }
  }
  _tile_stored(0, product, code_bytes);
  _tile_stored(1, product + 16, code_bytes);
  if constexpr (kPair) {
    _tile_stored(2, product + kTileRows * kBlockColumns, code_bytes);
    _tile_stored(3, product + kTileRows * kBlockColumns + 16, code_bytes);
  }
}

template <class Tiles>
void multiply_with_tiles(const MultiplyJob& job) {
  const Activation& activation = *job.activation;
  const int chunks = activation.group_size / kChunk;
  const int planes = planes_of(activation.format);
  const int64_t row_words = activation.row_words();
  alignas(64) uint32_t product[2 * kTileRows * kBlockColumns];
  const int64_t depth = row_words / planes;
  const TileConfig config = tile_config(static_cast<int>(depth < kTileWords ? depth : kTileWords));
  __asm__ volatile("" ::"r"(&config) : "memory"); // gcc thinks that _tile_loadconfig reads eight bytes only
  _tile_loadconfig(&config);
  std::memset(job.tile, 0, sizeof(float) * job.row_count * kBlockColumns);
  for (int64_t group = 0; group < activation.groups; ++group) {
    decode_group<Tiles>(job.block, group, chunks, job.unpacked);
    const __m512 scales[2] = {
        Simd512::load_as<DType::f16>(job.block.scales, group * kBlockColumns),
        Simd512::load_as<DType::f16>(job.block.scales, group * kBlockColumns + 16)};
    for (int64_t row = 0; row < job.row_count; row += 2 * kTileRows) {
      const int64_t rows = job.row_count - row < 2 * kTileRows ? job.row_count - row : 2 * kTileRows;
      const uint32_t* x = activation.row(group, job.row_begin + row);
      if (rows > kTileRows) {
        multiply_tiles<Tiles, true>(x, row_words, planes, job.unpacked, product);
      } else {
        multiply_tiles<Tiles, false>(x, row_words, planes, job.unpacked, product);
      }
      const float* steps = activation.scale + activation.row_index(group, job.row_begin + row);
      float* tile = job.tile + row * kBlockColumns;
      for (int64_t i = 0; i < rows; ++i) {
        const __m512 step = _mm512_set1_ps(steps[i]);
        for (int half = 0; half < 2; ++half) {
          const int64_t at = i * kBlockColumns + half * 16;
          const __m512 scaled = _mm512_mul_ps(scales[half], step);
          Simd512::store(tile + at, _mm512_fmadd_ps(Tiles::load(product + at), scaled, Simd512::load(tile + at)));
        }
      }
    }
  }
  _tile_release();
}

// Below these numbers of rows the vector kernels are faster.
constexpr int64_t kRowsForInt8 = 4;
constexpr int64_t kRowsForBf16 = 2;
constexpr int64_t kRowsForPlanes = 4;

Format choose_format(DType dtype, bool dynamic_int8, int64_t rows) {
  if (dynamic_int8) return Format::int8;
  if (dtype == DType::bf16) return rows >= kRowsForBf16 ? Format::bf16 : Format::f32;
  if (rows < kRowsForPlanes) return Format::f32;
  return dtype == DType::f16 ? Format::bf16x2 : Format::bf16x3;
}

void prepare(const PrepareJob& job, int64_t group, int64_t row_begin, int64_t row_end) {
  kAvx512Bf16Kernels.prepare(job, group, row_begin, row_end);
}

void multiply(const MultiplyJob& job) {
  const Format format = job.activation->format;
  if (format == Format::f32 || (format == Format::int8 && job.activation->rows < kRowsForInt8)) {
    kAvx512Bf16Kernels.multiply(job);
  } else if (format == Format::int8) {
    multiply_with_tiles<Int8Tiles>(job);
  } else {
    multiply_with_tiles<Bf16Tiles>(job);
  }
}

void store(const StoreJob& job) { kAvx512Bf16Kernels.store(job); }

} // namespace

bool enable_amx() {
  constexpr long kRequestPermission = 0x1023; // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;              // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

const Kernels kAmxKernels = {"amx", Simd512::kLanes, choose_format, prepare, multiply, store};

} // namespace parofx
