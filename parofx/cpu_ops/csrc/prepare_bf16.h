// Rotates many rows of bf16 for products in bf16, as prepare_simd.h does, but moves two channels at a time: lanes are
// rows, and what is transposed, before and after, are words of two bf16. Two vectors of rows share one look-up of a
// pair and its angle.
#pragma once

#include "numeric.h"
#include "simd512.h"

namespace parofx {
namespace {

constexpr int kVectorRows = Simd512::kLanes;
constexpr int kVectorsAtOnce = 2;
constexpr int kRowsAtOnce = kVectorsAtOnce * kVectorRows;

inline __m512i bf16_bits(__m512 v) {
  return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
}

// Loads and scales 16 rows of one group; those from `rows` on repeat the last. Channel k is at `out + k · stride`.
void load_transposed(
    const PrepareJob& job, int64_t offset, const float* channel_scales, int rows, int stride, float* out) {
  const auto* x = static_cast<const uint16_t*>(job.x) + offset;
  for (int k = 0; k < job.out.group_size; k += 2 * kVectorRows) {
    __m512 words[kVectorRows];
    for (int i = 0; i < kVectorRows; ++i) words[i] = _mm512_loadu_ps(x + (i < rows ? i : rows - 1) * job.row_stride + k);
    Simd512::transpose(words);
    for (int i = 0; i < kVectorRows; ++i) {
      const __m512i word = Simd512::bits(words[i]);
      const __m512 even = Simd512::floats(_mm512_slli_epi32(word, 16));
      const __m512 odd = Simd512::floats(_mm512_and_si512(word, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
      float* to = out + (k + 2 * i) * stride;
      _mm512_store_ps(to, _mm512_mul_ps(even, _mm512_set1_ps(channel_scales[k + 2 * i])));
      _mm512_store_ps(to + stride, _mm512_mul_ps(odd, _mm512_set1_ps(channel_scales[k + 2 * i + 1])));
    }
  }
}

// Runs all rounds, from `now` to `next` and back; returns where the last one left its result.
template <int kVectors>
const float* rotate_vectors(float* now, float* next, const GroupRotation& rotation) {
  constexpr int stride = kVectors * kVectorRows;
  const int half = rotation.layout.group_size / 2;
  for (int round = 0; round < rotation.layout.rounds; ++round) {
    const uint8_t* source = rotation.source(round);
    const float* cosines = rotation.cosines(round);
    const float* sines = rotation.sines(round);
    for (int t = 0; t < half; ++t) {
      const __m512 c = _mm512_set1_ps(cosines[t]);
      const __m512 s = _mm512_set1_ps(sines[t]);
      const float* from = now + source[t] * stride;
      const float* other = now + source[half + t] * stride;
#pragma GCC unroll 2
      for (int i = 0; i < stride; i += kVectorRows) {
        const __m512 first = _mm512_load_ps(from + i);
        const __m512 second = _mm512_load_ps(other + i);
        _mm512_store_ps(next + t * stride + i, _mm512_fmadd_ps(c, first, _mm512_mul_ps(s, second)));
        _mm512_store_ps(next + (half + t) * stride + i, _mm512_fmsub_ps(c, second, _mm512_mul_ps(s, first)));
      }
    }
    float* const swap = now;
    now = next;
    next = swap;
  }
  return now;
}

// Rounds 16 rows to the words of their format, in the channels' own order, which `source` restores.
void store_transposed(
    const PrepareJob& job, int64_t group, int64_t row, int rows, const uint8_t* source, int stride, const float* from) {
  constexpr int steps = words_per_plane(Format::bf16);
  __m512 sum = _mm512_setzero_ps();
  for (int begin = 0; begin < job.out.group_size / 2; begin += kVectorRows) {
    __m512 words[kVectorRows];
    for (int i = 0; i < kVectorRows; ++i) {
      const int channel = (begin + i) / steps * kChunk + i % steps;
      const __m512i first = bf16_bits(_mm512_load_ps(from + source[channel] * stride));
      const __m512i second = bf16_bits(_mm512_load_ps(from + source[channel + steps] * stride));
      const __m512i high = _mm512_slli_epi32(second, 16);
      const __m512 low_value = Simd512::floats(_mm512_slli_epi32(first, 16));
      sum = _mm512_add_ps(sum, _mm512_add_ps(low_value, Simd512::floats(high)));
      words[i] = Simd512::floats(_mm512_or_si512(first, high));
    }
    Simd512::transpose(words);
    for (int i = 0; i < rows; ++i) {
      const bool tiles = job.out.format == Format::bf16_tiles;
      _mm512_storeu_ps(tiles ? job.out.in_tile(group, row + i, begin) : job.out.row(group, row + i) + begin, words[i]);
    }
  }
  const __mmask16 present = static_cast<__mmask16>((1u << rows) - 1);
  const int64_t index = job.out.row_index(group, row);
  _mm512_mask_storeu_ps(job.out.sum + index, present, sum);
  _mm512_mask_storeu_ps(job.out.scale + index, present, _mm512_set1_ps(1.0f));
}

template <int kVectors>
void prepare_vectors(const PrepareJob& job, int64_t group, int64_t row_begin, int64_t row_end) {
  constexpr int stride = kVectors * kVectorRows;
  const RotationLayout layout{job.out.group_size, job.rounds};
  const GroupRotation rotation{job.rotation + group * layout.group_bytes(), layout};
  alignas(64) float buffers[2][kMaxGroupSize * stride]; // [channel][row]
  const auto rows_of = [&](int vector) {
    const int64_t left = row_end - row_begin - vector * kVectorRows;
    return static_cast<int>(left < kVectorRows ? left : kVectorRows);
  };
  for (int vector = 0; vector < kVectors; ++vector) {
    const int64_t offset = (row_begin + vector * kVectorRows) * job.row_stride + group * layout.group_size;
    load_transposed(job, offset, rotation.channel_scales(), rows_of(vector), stride, buffers[0] + vector * kVectorRows);
  }
  const float* rotated = rotate_vectors<kVectors>(buffers[0], buffers[1], rotation);
  for (int vector = 0; vector < kVectors; ++vector) {
    store_transposed(
        job, group, row_begin + vector * kVectorRows, rows_of(vector), rotation.source(layout.rounds), stride,
        rotated + vector * kVectorRows);
  }
}

// Whether prepare_bf16 serves; few rows are faster one by one, and it leaves no rotated floats to project.
bool is_bf16_throughout(const PrepareJob& job) {
  const bool to_bf16 = job.out.format == Format::bf16 || job.out.format == Format::bf16_tiles;
  return job.dtype == DType::bf16 && to_bf16 && job.rounds > 0 && job.projection_count == 0;
}

// Prepares up to kRowsAtOnce rows.
void prepare_bf16(const PrepareJob& job, int64_t group, int64_t row_begin, int64_t row_end) {
  if (row_end - row_begin > kVectorRows) return prepare_vectors<2>(job, group, row_begin, row_end);
  prepare_vectors<1>(job, group, row_begin, row_end);
}

} // namespace
} // namespace parofx
