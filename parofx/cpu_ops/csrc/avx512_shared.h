// What both AVX512 paths share: the rotation of one row in registers, and the fp32 product.
#pragma once

#include "multiply_simd.h"
#include "prepare_simd.h"
#include "simd512.h"

namespace parofx {
namespace {

// v[source] for 16 of the group's channels, the group being kVectors registers.
template <int kVectors>
inline __m512 pick(const __m512 (&v)[kVectors], const uint8_t* source) {
  const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
  const __m512 first = _mm512_permutex2var_ps(v[0], index, v[1]); // selects by the low five bits
  if constexpr (kVectors == 2) return first;
  const __mmask16 upper32 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
  const __m512 low = _mm512_mask_mov_ps(first, upper32, _mm512_permutex2var_ps(v[2], index, v[3]));
  if constexpr (kVectors == 4) return low;
  const __m512 third = _mm512_permutex2var_ps(v[kVectors - 4], index, v[kVectors - 3]);
  const __m512 fourth = _mm512_permutex2var_ps(v[kVectors - 2], index, v[kVectors - 1]);
  const __mmask16 upper64 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(64));
  return _mm512_mask_mov_ps(low, upper64, _mm512_mask_mov_ps(third, upper32, fourth));
}

template <int kVectors>
void rotate_in_registers(float* row, const GroupRotation& rotation) {
  constexpr int half = kVectors / 2;
  __m512 v[kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) v[i] = _mm512_loadu_ps(row + 16 * i);
  for (int round = 0; round < rotation.layout.rounds; ++round) {
    const uint8_t* source = rotation.source(round);
    const float* cosines = rotation.cosines(round);
    const float* sines = rotation.sines(round);
    __m512 next[kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < half; ++i) {
      const __m512 first = pick(v, source + 16 * i);
      const __m512 second = pick(v, source + 16 * (half + i));
      const __m512 c = _mm512_loadu_ps(cosines + 16 * i);
      const __m512 s = _mm512_loadu_ps(sines + 16 * i);
      next[i] = _mm512_fmadd_ps(c, first, _mm512_mul_ps(s, second));
      next[half + i] = _mm512_fmsub_ps(c, second, _mm512_mul_ps(s, first));
    }
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) v[i] = next[i];
  }
  const uint8_t* source = rotation.source(rotation.layout.rounds);
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) _mm512_storeu_ps(row + 16 * i, pick(v, source + 16 * i));
}

struct Avx512Base {
  using Simd = Simd512;
  static constexpr int kRowsOneByOne = 5;

  static void rotate_row(float* row, const GroupRotation& rotation) {
    switch (rotation.layout.group_size) {
      case 32: return rotate_in_registers<2>(row, rotation);
      case 64: return rotate_in_registers<4>(row, rotation);
      default: return rotate_in_registers<8>(row, rotation);
    }
  }
};

struct DotF32 {
  using Acc = __m512;
  using Weights = __m512i;
  static constexpr int kPlanes = 1;
  static constexpr int kSteps = words_per_plane(Format::f32);
  static constexpr int kDirectRows = 8;
  static constexpr int kTileRows = 12; // 24 accumulators, 2 vectors of codes
  static Acc zero() { return _mm512_setzero_ps(); }
  template <int kBits>
  static Weights decode(const __m512i* words, int step) {
    if constexpr (kBits == 8) {
      const __m512i code = _mm512_and_si512(_mm512_srli_epi32(words[step % 2], step / 2 * 8), _mm512_set1_epi32(255));
      return _mm512_castps_si512(_mm512_cvtepi32_ps(code));
    }
    // The permutation reads four bits of each index, so the codes need no mask.
    const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_castps_si512(_mm512_permutexvar_ps(_mm512_srli_epi32(words[0], 4 * step), values));
  }
  static Acc mac(Acc acc, Weights codes, __m512i x) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(codes), _mm512_castsi512_ps(x), acc);
  }
  static Acc join(Acc a, Acc b) { return _mm512_add_ps(a, b); }
  static __m512 result(Acc acc) { return acc; }
};

} // namespace
} // namespace parofx
