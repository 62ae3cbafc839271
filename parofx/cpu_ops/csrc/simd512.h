// Sixteen float lanes on AVX512 F, BW, VL and DQ, with the interface of simd256.h.
#pragma once

#include <immintrin.h>

#include "numeric.h"

namespace parofx {
namespace {

struct Simd512 {
  using Float = __m512;
  using Int = __m512i;
  static constexpr int kLanes = 16;

  static Float zero() { return _mm512_setzero_ps(); }
  static Float broadcast(float v) { return _mm512_set1_ps(v); }
  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
  static Float fmadd(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }   // ab + c
  static Float fmsub(Float a, Float b, Float c) { return _mm512_fmsub_ps(a, b, c); }   // ab - c
  static Float fnmadd(Float a, Float b, Float c) { return _mm512_fnmadd_ps(a, b, c); } // c - ab
  static Float abs(Float v) { return _mm512_abs_ps(v); }

  static Int zero_int() { return _mm512_setzero_si512(); }
  static Int load_int(const void* p) { return _mm512_loadu_si512(p); }
  static void store_int(void* p, Int v) { _mm512_storeu_si512(p, v); }
  static Int broadcast_word(const uint32_t* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
  static Int broadcast_int(int v) { return _mm512_set1_epi32(v); }
  static Int add_int(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static Int and_int(Int a, Int b) { return _mm512_and_si512(a, b); }
  static Int or_int(Int a, Int b) { return _mm512_or_si512(a, b); }
  template <int kBits>
  static Int shift_left(Int v) {
    return _mm512_slli_epi32(v, kBits);
  }
  template <int kBits>
  static Int shift_right(Int v) {
    return _mm512_srli_epi32(v, kBits);
  }
  static Int bits(Float v) { return _mm512_castps_si512(v); }
  static Float floats(Int v) { return _mm512_castsi512_ps(v); }
  static Float to_float(Int v) { return _mm512_cvtepi32_ps(v); }
  static Int round(Float v) { return _mm512_cvtps_epi32(v); } // to nearest even

  static float sum(Float v) { return _mm512_reduce_add_ps(v); }
  static float maximum(Float v) { return _mm512_reduce_max_ps(v); }
  static int sum_int(Int v) { return _mm512_reduce_add_epi32(v); }

  static Float load_bytes(const uint8_t* p) {
    return to_float(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }

  template <DType dtype>
  static Float load_as(const void* data, int64_t index) {
    if constexpr (dtype == DType::f32) return load(static_cast<const float*>(data) + index);
    const auto* from = reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(data) + index);
    if constexpr (dtype == DType::f16) return _mm512_cvtph_ps(_mm256_loadu_si256(from));
    return floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from)), 16));
  }

  template <DType dtype>
  static void store_as(void* data, int64_t index, Float v) {
    if constexpr (dtype == DType::f32) return store(static_cast<float*>(data) + index, v);
    auto* out = reinterpret_cast<__m256i*>(static_cast<uint16_t*>(data) + index);
    if constexpr (dtype == DType::f16) return _mm256_storeu_si256(out, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#ifdef __AVX512BF16__
    return _mm256_storeu_si256(out, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
#else
    // bf16: round to nearest even by adding half a unit; a NaN would overflow into infinity, so it is replaced.
    const Int odd = _mm512_and_si512(_mm512_srli_epi32(bits(v), 16), _mm512_set1_epi32(1));
    const Int rounded = _mm512_add_epi32(bits(v), _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const Int high = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256(out, _mm512_cvtepi32_epi16(_mm512_srli_epi32(high, 16)));
#endif
  }

  // Bytes 0..2 become the signed digits, base 256, of integers of up to 127 · 2^16: x = Σ (byte − 128) · 256^i.
  static Int signed_digits(Int v) {
    const Int centre = _mm512_set1_epi32(0x808080);
    return _mm512_xor_si512(_mm512_add_epi32(v, centre), centre);
  }

  // The low bytes of two chunks of 8 channels, in the order of Format::int8.
  static void store_int8(uint32_t* words, Int v) {
    const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(words), _mm_shuffle_epi8(_mm512_cvtepi32_epi8(v), order));
  }

  // Fetches what lies kPrefetchBytes ahead of the reader, as weights do that are read from front to back.
  // Forced inline: gcc deems a function that only prefetches free of effects and drops its calls.
  [[gnu::always_inline]] static void prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T2);
    _mm_prefetch(static_cast<const char*>(p) - kPrefetchBytes + kNearBytes, _MM_HINT_T0);
  }

  static void transpose(Float (&r)[16]) {
    Float t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    // Now r[4a+b] holds column b of each 4x4 block; gather the 128-bit lanes of rows 4a..4a+3.
    for (int b = 0; b < 4; ++b) {
      const Float low01 = _mm512_shuffle_f32x4(r[b], r[4 + b], 0x44);
      const Float high01 = _mm512_shuffle_f32x4(r[b], r[4 + b], 0xee);
      const Float low23 = _mm512_shuffle_f32x4(r[8 + b], r[12 + b], 0x44);
      const Float high23 = _mm512_shuffle_f32x4(r[8 + b], r[12 + b], 0xee);
      t[b] = _mm512_shuffle_f32x4(low01, low23, 0x88);
      t[4 + b] = _mm512_shuffle_f32x4(low01, low23, 0xdd);
      t[8 + b] = _mm512_shuffle_f32x4(high01, high23, 0x88);
      t[12 + b] = _mm512_shuffle_f32x4(high01, high23, 0xdd);
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
  }
};

} // namespace
} // namespace parofx
