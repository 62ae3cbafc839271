// AVX512 with VNNI (int8 products) and BF16 (bf16 products).
#include "avx512_shared.h"

namespace parofx {
namespace {

// Splits a row into bf16 planes, each rounding what the ones before it left over.
template <int kPlanes>
void finish_bf16(const float* row, int group_size, uint32_t* words, float* scale, float* sum) {
  // Channels (0,4), (1,5), (2,6), (3,7) of each chunk meet in one word.
  const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
  __m512 total = _mm512_setzero_ps();
  for (int k = 0; k < group_size; k += Simd512::kLanes) {
    __m512 rest = _mm512_loadu_ps(row + k);
    for (int plane = 0; plane < kPlanes; ++plane) {
      const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(rest));
      const __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
      total = _mm512_add_ps(total, value);
      rest = _mm512_sub_ps(rest, value);
      uint32_t* out = words + (plane * group_size + k) / 2;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_shuffle_epi8(rounded, order));
    }
  }
  *scale = 1.0f;
  *sum = _mm512_reduce_add_ps(total);
}

struct Avx512Bf16 : Avx512Base {
  static auto finish(Format format) {
    switch (format) {
      case Format::bf16: return finish_bf16<1>;
      case Format::bf16x2: return finish_bf16<2>;
      case Format::bf16x3: return finish_bf16<3>;
      case Format::int8: return finish_int8<Simd>;
      default: return finish_f32<Simd>;
    }
  }
};

struct DotBf16 {
  using Acc = __m512;
  using Weights = __m512i;
  static constexpr int kSteps = words_per_chunk(Format::bf16);
  static constexpr int kDirectRows = 8;
  static constexpr int kTileRows = 12;
  static Acc zero() { return _mm512_setzero_ps(); }
  // Looks 0..15 up in bf16; the permutation reads five bits of each index and the table holds everything twice, so
  // the codes need no mask.
  static Weights decode(__m512i words, int step) {
    const __m256i half = _mm256_setr_epi16(
        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150,
        0x4160, 0x4170);
    return _mm512_permutexvar_epi16(_mm512_srli_epi32(words, 4 * step), _mm512_broadcast_i64x4(half));
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
  static constexpr int kSteps = words_per_chunk(Format::int8);
  static constexpr int kDirectRows = 8;
  static constexpr int kTileRows = 12;
  static Acc zero() { return _mm512_setzero_si512(); }
  static Weights decode(__m512i words, int step) {
    return _mm512_and_si512(_mm512_srli_epi16(words, 4 * step), _mm512_set1_epi8(15));
  }
  // Written as assembly because gcc 12 spills accumulators around the intrinsic, at half the speed.
  static Acc mac(Acc acc, Weights codes, __m512i x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(x));
    return acc;
  }
  static Acc join(Acc a, Acc b) { return _mm512_add_epi32(a, b); }
  static __m512 result(Acc acc) { return _mm512_cvtepi32_ps(acc); }
};

Format choose_format(DType dtype, bool dynamic_int8, int64_t) {
  if (dynamic_int8) return Format::int8;
  return dtype == DType::bf16 ? Format::bf16 : Format::f32;
}

void multiply(const MultiplyJob& job) {
  switch (job.activation->format) {
    case Format::int8: return multiply_with<Simd512, DotInt8>(job);
    case Format::bf16: return multiply_with<Simd512, DotBf16>(job);
    default: return multiply_with<Simd512, DotF32>(job);
  }
}

} // namespace

const Kernels kAvx512Bf16Kernels = {
    "avx512_bf16", Simd512::kLanes, choose_format, prepare<Avx512Bf16>, multiply, store<Simd512>};

} // namespace parofx
