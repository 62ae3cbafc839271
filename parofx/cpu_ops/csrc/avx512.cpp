// AVX512 F, BW, VL and DQ, without the dot-product instructions.
#include "avx512_shared.h"
#include "dense_rounds.h"
#include "rounding.h"

namespace parofx {
namespace {

struct Avx512 : Avx512Base {
  // There are no bf16 products: bf16 inputs are multiplied in fp32.
  static auto finish(Format format) { return format == Format::int8 ? finish_integer<Simd, Format::int8> : finish_f32<Simd>; }
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
    return _mm512_and_si512(_mm512_srli_epi16(words[0], 4 * step), _mm512_set1_epi8(15));
  }
  static Acc mac(Acc acc, Weights codes, __m512i x) {
    // |pair| <= 2 · 15 · 127, far from the saturation of maddubs.
    const __m512i pairs = _mm512_maddubs_epi16(codes, x);
    return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }
  static Acc join(Acc a, Acc b) { return _mm512_add_epi32(a, b); }
  static __m512 result(Acc acc) { return _mm512_cvtepi32_ps(acc); }
};

// Pairs of products of 8-bit codes would saturate 16 bits.
Format choose_format(DType, bool dynamic_int8, int64_t, int bits) {
  return dynamic_int8 && bits != 8 ? Format::int8 : Format::f32;
}

void multiply(const MultiplyJob& job) {
  if (job.activation->format == Format::int8) return multiply_with<Simd512, DotInt8, 4>(job);
  if (job.bits == 8) return multiply_with<Simd512, DotF32, 8>(job);
  multiply_with<Simd512, DotF32, 4>(job);
}

} // namespace

const Kernels kAvx512Kernels = {
    "avx512", Simd512::kLanes, choose_format, all_groups, prepare<Avx512>, multiply, store<Simd512>, round_columns,
    dense_rounds};

} // namespace parofx
