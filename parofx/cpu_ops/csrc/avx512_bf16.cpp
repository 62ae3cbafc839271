// AVX512 with VNNI (int8 products) and BF16 (bf16 products).
#include "avx512_shared.h"
#include "dense_rounds.h"
#include "prepare_bf16.h"
#include "rounding.h"

namespace parofx {
namespace {

void finish_bf16(const float* row, int group_size, uint32_t* words, float* scale, float* sum) {
  // Channels (0,4), (1,5), (2,6), (3,7) of each chunk meet in one word.
  const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
  __m512 total = _mm512_setzero_ps();
  for (int k = 0; k < group_size; k += Simd512::kLanes) {
    const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(row + k)));
    total = _mm512_add_ps(total, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + k / 2), _mm256_shuffle_epi8(rounded, order));
  }
  *scale = 1.0f;
  *sum = _mm512_reduce_add_ps(total);
}

struct Avx512Bf16 : Avx512Base {
  static auto finish(Format format) {
    switch (format) {
      case Format::bf16:
      case Format::bf16_tiles: return finish_bf16;
      case Format::int8: return finish_integer<Simd, Format::int8>;
      default: return finish_integer<Simd, Format::int24>;
    }
  }
};

struct DotBf16 {
  using Acc = __m512;
  using Weights = __m512i;
  static constexpr int kPlanes = 1;
  static constexpr int kSteps = words_per_plane(Format::bf16);
  static constexpr int kDirectRows = 8;
  static constexpr int kTileRows = 12;
  static Acc zero() { return _mm512_setzero_ps(); }
  // Looks 0..15 up in bf16; the permutation reads five bits of each index and the table holds everything twice, so
  // the codes need no mask.
  template <int kBits>
  static Weights decode(const __m512i* words, int step) {
    static_assert(kBits == 4);
    const __m256i half = _mm256_setr_epi16(
        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150,
        0x4160, 0x4170);
    return _mm512_permutexvar_epi16(_mm512_srli_epi32(words[0], 4 * step), _mm512_broadcast_i64x4(half));
  }
  static Acc mac(Acc acc, Weights codes, __m512i x) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(codes), reinterpret_cast<__m512bh>(x));
  }
  static Acc join(Acc a, Acc b) { return _mm512_add_ps(a, b); }
  static __m512 result(Acc acc) { return acc; }
};

struct DotInt8 {
  using Acc = __m512i;
  using Weights = __m512i;
  static constexpr int kPlanes = 1;
  static constexpr int kSteps = words_per_plane(Format::int8);
  static constexpr int kDirectRows = 8;
  static constexpr int kTileRows = 12;
  static Acc zero() { return _mm512_setzero_si512(); }
  template <int kBits>
  static Weights decode(const __m512i* words, int step) {
    if constexpr (kBits == 8) return words[step];
    return _mm512_and_si512(_mm512_srli_epi16(words[0], 4 * step), _mm512_set1_epi8(15));
  }
  // Written as assembly because gcc 12 spills accumulators around the intrinsic, at half the speed.
  static Acc mac(Acc acc, Weights codes, __m512i x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(x));
    return acc;
  }
  static Acc join(Acc a, Acc b) { return _mm512_add_epi32(a, b); }
  static __m512 result(Acc acc) { return _mm512_cvtepi32_ps(acc); }
};

// The same products, three times for every activation.
struct DotInt24 : DotInt8 {
  static constexpr int kPlanes = planes_of(Format::int24);
  static constexpr int kDirectRows = 2;
  static constexpr int kTileRows = 4;
};

Format choose_format(DType dtype, bool dynamic_int8, int64_t rows, int bits) {
  if (dynamic_int8) return Format::int8;
  // One row is a matter of decoding the weight, which integers make cheaper.
  return dtype == DType::bf16 && rows > 1 && bits != 8 ? Format::bf16 : Format::int24;
}

void prepare_rows(const PrepareJob& job, int64_t group, int64_t row_begin, int64_t row_end) {
  if (is_bf16_throughout(job) && row_end - row_begin > Avx512Bf16::kRowsOneByOne) {
    return prepare_bf16(job, group, row_begin, row_end);
  }
  for (int64_t row = row_begin; row < row_end; row += kVectorRows) {
    prepare<Avx512Bf16>(job, group, row, row + kVectorRows < row_end ? row + kVectorRows : row_end);
  }
}

void multiply(const MultiplyJob& job) {
  const bool int8 = job.activation->format == Format::int8;
  if (job.activation->format == Format::bf16) return multiply_with<Simd512, DotBf16, 4>(job);
  if (job.bits == 8) return int8 ? multiply_with<Simd512, DotInt8, 8>(job) : multiply_with<Simd512, DotInt24, 8>(job);
  int8 ? multiply_with<Simd512, DotInt8, 4>(job) : multiply_with<Simd512, DotInt24, 4>(job);
}

} // namespace

const Kernels kAvx512Bf16Kernels = {
    "avx512_bf16", kRowsAtOnce, choose_format, all_groups, prepare_rows, multiply, store<Simd512>, round_columns,
    dense_rounds};

} // namespace parofx
