// AVX2 with FMA and F16C: sixteen registers of eight floats.
#include "dense_rounds.h"
#include "multiply_simd.h"
#include "prepare_simd.h"
#include "rounding.h"
#include "simd256.h"

namespace parofx {
namespace {

struct Avx2 {
  using Simd = Simd256;
  static constexpr int kRowsOneByOne = 3;

  static __m256 gather(const float* v, const uint8_t* source) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(source));
    return _mm256_i32gather_ps(v, _mm256_cvtepu8_epi32(bytes), sizeof(float));
  }

  static void rotate_row(float* row, const GroupRotation& rotation) {
    const int group_size = rotation.layout.group_size;
    const int half = group_size / 2;
    alignas(32) float buffers[2][kMaxGroupSize];
    const float* now = row;
    float* next = buffers[0];
    for (int round = 0; round < rotation.layout.rounds; ++round) {
      const uint8_t* source = rotation.source(round);
      for (int t = 0; t < half; t += Simd::kLanes) {
        const __m256 first = gather(now, source + t);
        const __m256 second = gather(now, source + half + t);
        const __m256 c = Simd::load(rotation.cosines(round) + t);
        const __m256 s = Simd::load(rotation.sines(round) + t);
        Simd::store(next + t, Simd::fmadd(c, first, Simd::mul(s, second)));
        Simd::store(next + half + t, Simd::fmsub(c, second, Simd::mul(s, first)));
      }
      now = next;
      next = buffers[(round + 1) % 2];
    }
    const uint8_t* source = rotation.source(rotation.layout.rounds);
    for (int k = 0; k < group_size; k += Simd::kLanes) Simd::store(row + k, gather(now, source + k));
  }

  // There are no bf16 products: bf16 inputs are multiplied in fp32.
  static auto finish(Format format) { return format == Format::int8 ? finish_integer<Simd, Format::int8> : finish_f32<Simd>; }
};

struct DotF32 {
  using Acc = __m256;
  using Weights = __m256i;
  static constexpr int kPlanes = 1;
  static constexpr int kSteps = words_per_plane(Format::f32);
  static constexpr int kDirectRows = 2;
  static constexpr int kTileRows = 3; // 12 accumulators, 4 vectors of codes
  static Acc zero() { return _mm256_setzero_ps(); }
  template <int kBits>
  static Weights decode(const __m256i* words, int step) {
    const __m256i shifted =
        kBits == 8 ? _mm256_srli_epi32(words[step % 2], step / 2 * 8) : _mm256_srli_epi32(words[0], 4 * step);
    const __m256i code = _mm256_and_si256(shifted, _mm256_set1_epi32((1 << kBits) - 1));
    return _mm256_castps_si256(_mm256_cvtepi32_ps(code));
  }
  static Acc mac(Acc acc, Weights codes, __m256i x) {
    return _mm256_fmadd_ps(_mm256_castsi256_ps(codes), _mm256_castsi256_ps(x), acc);
  }
  static Acc join(Acc a, Acc b) { return _mm256_add_ps(a, b); }
  static __m256 result(Acc acc) { return acc; }
};

struct DotInt8 {
  using Acc = __m256i;
  using Weights = __m256i;
  static constexpr int kPlanes = 1;
  static constexpr int kSteps = words_per_plane(Format::int8);
  static constexpr int kDirectRows = 2;
  static constexpr int kTileRows = 2;
  static Acc zero() { return _mm256_setzero_si256(); }
  template <int kBits>
  static Weights decode(const __m256i* words, int step) {
    return _mm256_and_si256(_mm256_srli_epi16(words[0], 4 * step), _mm256_set1_epi8(15));
  }
  static Acc mac(Acc acc, Weights codes, __m256i x) {
    // |pair| <= 2 · 15 · 127, far from the saturation of maddubs.
    const __m256i pairs = _mm256_maddubs_epi16(codes, x);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static Acc join(Acc a, Acc b) { return _mm256_add_epi32(a, b); }
  static __m256 result(Acc acc) { return _mm256_cvtepi32_ps(acc); }
};

// Pairs of products of 8-bit codes would saturate 16 bits.
Format choose_format(DType, bool dynamic_int8, int64_t, int bits) {
  return dynamic_int8 && bits != 8 ? Format::int8 : Format::f32;
}

void multiply(const MultiplyJob& job) {
  if (job.activation->format == Format::int8) return multiply_with<Simd256, DotInt8, 4>(job);
  if (job.bits == 8) return multiply_with<Simd256, DotF32, 8>(job);
  multiply_with<Simd256, DotF32, 4>(job);
}

} // namespace

const Kernels kAvx2Kernels = {
    "avx2", Simd256::kLanes, choose_format, all_groups, prepare<Avx2>, multiply, store<Simd256>, round_columns,
    dense_rounds};

} // namespace parofx
