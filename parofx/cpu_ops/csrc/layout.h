// The memory layouts that every kernel reads. parofx/cpu_ops/layout.py writes them.
//
// Weight: the codes of eight consecutive input channels of one output channel (a "chunk") form 32-bit words. With 4 bits
// it is one word, channel 8c+j in bits 4j..4j+3. With 8 bits they are two, of which word w holds channels 8c+w, 8c+w+2,
// 8c+w+4 and 8c+w+6, the first in the lowest byte. With 3 bits four chunks (a "run") form three words: nibble j of word
// w < 2 holds the low two bits of channel j of chunk 2w, and above them those of chunk 2w+1; nibble j of the third holds
// the high bits, bit c that of channel j of chunk c. The matrix of words (K · bits/32, N) is cut into blocks of 32
// columns; each block is stored row by row, so a kernel streams one block from front to back. The last block is as
// narrow as N leaves it: nothing is padded.
//
//   block b: words [K · bits/32][width]      width = min(32, N - 32b), at byte 32b·K·bits/8
//            scales fp16 [K/g][width], zeros uint8 [K/g][width], at element 32b·K/g
//   W[k, n] = (code[k, n] - zero[k/g, n]) · scale[k/g, n]
//
// Rotation: per group of g input channels, in one run of bytes,
//
//   float channel_scales[g]                                 multiply the activation
//   rounds × { uint8 source[g]; float cos[g/2]; float sin[g/2] }
//   uint8 source[g]                                         only when rounds > 0
//
// A round first gathers v ← v[source]: the first halves of its pairs, then the second halves, in pair order. Then
// (v[t], v[g/2+t]) ← (cos·v[t] + sin·v[g/2+t], cos·v[g/2+t] - sin·v[t]). The next round's `source` refers to this
// order, and the last `source` restores the channels' own order: no round scatters.
#pragma once

#include <cstdint>

namespace parofx {

constexpr int kBlockColumns = 32;
constexpr int kChunk = 8;          // input channels whose codes are stored together
constexpr int kRun = 32;           // input channels whose 3-bit codes are stored together
constexpr int kMaxGroupSize = 128; // group sizes are 32, 64 and 128

struct RotationLayout {
  int group_size;
  int rounds;

  constexpr int64_t scales_bytes() const { return 4 * int64_t{group_size}; }
  constexpr int64_t round_bytes() const { return 5 * int64_t{group_size}; }
  constexpr int64_t group_bytes() const {
    return scales_bytes() + rounds * round_bytes() + (rounds > 0 ? group_size : 0);
  }
};

// The parameters of one group; `rounds` may be zero.
struct GroupRotation {
  const uint8_t* data;
  RotationLayout layout;

  const float* channel_scales() const { return reinterpret_cast<const float*>(data); }
  const uint8_t* source(int round) const { return data + layout.scales_bytes() + round * layout.round_bytes(); }
  const float* cosines(int round) const {
    return reinterpret_cast<const float*>(source(round) + layout.group_size);
  }
  const float* sines(int round) const { return cosines(round) + layout.group_size / 2; }
};

} // namespace parofx
