// 3-bit codes on their way to the kernels: one group of a block becomes the 4-bit layout, in the L1 cache, so that
// whatever multiplies 4-bit codes serves 3-bit ones. layout.h states both layouts.
#pragma once

#include "kernels.h"

namespace parofx {
namespace {

template <class Simd, int kPart>
[[gnu::always_inline]] inline typename Simd::Int nibbles_of(typename Simd::Int low, typename Simd::Int high) {
  // Two bits per nibble of the odd chunk are above those of the even one; bit kPart of a nibble becomes bit 2.
  if constexpr (kPart % 2 == 1) low = Simd::template shift_right<2>(low);
  if constexpr (kPart < 2) high = Simd::template shift_left<2 - kPart>(high);
  if constexpr (kPart > 2) high = Simd::template shift_right<kPart - 2>(high);
  return Simd::or_int(
      Simd::and_int(low, Simd::broadcast_int(0x33333333)), Simd::and_int(high, Simd::broadcast_int(0x44444444)));
}

// Returns one group's codes in the 4-bit layout, in `job.nibbles`.
template <class Simd>
const uint8_t* widen_planes(const MultiplyJob& job, int64_t group) {
  constexpr int64_t word_bytes = kBlockColumns * sizeof(uint32_t);
  const int runs = job.activation->group_size / kRun;
  const uint8_t* from = job.block.weight + group * runs * 3 * word_bytes;
  uint8_t* to = job.nibbles;
  for (int run = 0; run < runs; ++run, from += 3 * word_bytes, to += 4 * word_bytes) {
#pragma GCC unroll 6
    for (int64_t i = 0; i < 3 * word_bytes; i += 64) Simd::prefetch(from + kPrefetchBytes + i);
#pragma GCC unroll 4
    for (int64_t at = 0; at < word_bytes; at += sizeof(typename Simd::Int)) {
      const auto first = Simd::load_int(from + at);
      const auto second = Simd::load_int(from + word_bytes + at);
      const auto high = Simd::load_int(from + 2 * word_bytes + at);
      Simd::store_int(to + at, nibbles_of<Simd, 0>(first, high));
      Simd::store_int(to + word_bytes + at, nibbles_of<Simd, 1>(first, high));
      Simd::store_int(to + 2 * word_bytes + at, nibbles_of<Simd, 2>(second, high));
      Simd::store_int(to + 3 * word_bytes + at, nibbles_of<Simd, 3>(second, high));
    }
  }
  return job.nibbles;
}

// How far ahead of 4-bit codes to fetch: those that were just widened are where they should be.
inline int64_t prefetch_distance(const MultiplyJob& job) { return job.bits == 3 ? 0 : kPrefetchBytes; }

} // namespace
} // namespace parofx
