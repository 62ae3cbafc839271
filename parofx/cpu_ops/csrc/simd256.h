// Eight float lanes on AVX2, FMA and F16C. prepare_simd.h and multiply_simd.h are written against this interface.
#pragma once

#include <immintrin.h>

#include "numeric.h"

namespace parofx {
namespace {

struct Simd256 {
  using Float = __m256;
  using Int = __m256i;
  static constexpr int kLanes = 8;

  static Float zero() { return _mm256_setzero_ps(); }
  static Float broadcast(float v) { return _mm256_set1_ps(v); }
  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
  static Float fmadd(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }   // ab + c
  static Float fmsub(Float a, Float b, Float c) { return _mm256_fmsub_ps(a, b, c); }   // ab - c
  static Float fnmadd(Float a, Float b, Float c) { return _mm256_fnmadd_ps(a, b, c); } // c - ab
  static Float abs(Float v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }

  static Int zero_int() { return _mm256_setzero_si256(); }
  static Int load_int(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store_int(void* p, Int v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static Int broadcast_word(const uint32_t* p) { return _mm256_set1_epi32(static_cast<int>(*p)); }
  static Int broadcast_int(int v) { return _mm256_set1_epi32(v); }
  static Int add_int(Int a, Int b) { return _mm256_add_epi32(a, b); }
  static Int and_int(Int a, Int b) { return _mm256_and_si256(a, b); }
  static Int or_int(Int a, Int b) { return _mm256_or_si256(a, b); }
  template <int kBits>
  static Int shift_left(Int v) {
    return _mm256_slli_epi32(v, kBits);
  }
  template <int kBits>
  static Int shift_right(Int v) {
    return _mm256_srli_epi32(v, kBits);
  }
  static Int bits(Float v) { return _mm256_castps_si256(v); }
  static Float floats(Int v) { return _mm256_castsi256_ps(v); }
  static Float to_float(Int v) { return _mm256_cvtepi32_ps(v); }
  static Int round(Float v) { return _mm256_cvtps_epi32(v); } // to nearest even

  static float sum(Float v) { return reduce(v, [](__m128 a, __m128 b) { return _mm_add_ps(a, b); }); }
  static float maximum(Float v) { return reduce(v, [](__m128 a, __m128 b) { return _mm_max_ps(a, b); }); }
  static int sum_int(Int v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
  }

  static Float load_bytes(const uint8_t* p) {
    return to_float(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }

  template <DType dtype>
  static Float load_as(const void* data, int64_t index) {
    if constexpr (dtype == DType::f32) return load(static_cast<const float*>(data) + index);
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(data) + index));
    if constexpr (dtype == DType::f16) return _mm256_cvtph_ps(raw);
    return floats(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
  }

  template <DType dtype>
  static void store_as(void* data, int64_t index, Float v) {
    if constexpr (dtype == DType::f32) return store(static_cast<float*>(data) + index, v);
    auto* out = reinterpret_cast<__m128i*>(static_cast<uint16_t*>(data) + index);
    if constexpr (dtype == DType::f16) return _mm_storeu_si128(out, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    // bf16: round to nearest even by adding half a unit; a NaN would overflow into infinity, so it is replaced.
    const Int odd = _mm256_and_si256(_mm256_srli_epi32(bits(v), 16), _mm256_set1_epi32(1));
    const Int rounded = _mm256_add_epi32(bits(v), _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const Int nan = bits(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const Int high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
    const Int packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(out, _mm256_castsi256_si128(packed));
  }

  // One chunk of 8 channels as int8 in the order of Format::int8.
  static void store_int8(uint32_t* words, Int v) {
    const __m128i pairs = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m128i codes = _mm_shuffle_epi8(_mm_packs_epi16(pairs, pairs), order);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(words), codes);
  }

  // Fetches what lies kPrefetchBytes ahead of the reader, as weights do that are read from front to back.
  // Forced inline: gcc deems a function that only prefetches free of effects and drops its calls.
  [[gnu::always_inline]] static void prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T2);
    _mm_prefetch(static_cast<const char*>(p) - kPrefetchBytes + kNearBytes, _MM_HINT_T0);
  }

  static void transpose(Float (&r)[8]) {
    Float t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
      t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
    for (int i = 0; i < 8; ++i) r[i] = t[i];
  }

 private:
  template <class Op>
  static float reduce(Float v, Op op) {
    __m128 s = op(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = op(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(op(s, _mm_shuffle_ps(s, s, 1)));
  }
};

} // namespace
} // namespace parofx
