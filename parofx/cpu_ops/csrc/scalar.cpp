// The algorithm in plain C++: what every faster file computes, and what machines without one of them run.
//
//   v      = ROT(x ⊙ channel_scales)                                       per row and group of g channels, fp32
//   y[n]   = bias[n] + Σ_groups scale[n] · (Σ_k code[k, n] · v[k] − zero[n] · Σ_k v[k])
//          + Σ_r up[r, n] · Σ_k down[r, k] · v[k]                            where there is a low-rank correction
//
// With int8 activations v is first replaced by step · round(v / step), step = max|v| / 127.
#include <cmath>

#include "dense_rounds.h"
#include "numeric.h"
#include "rounding.h"

namespace parofx {
namespace {

Format choose_format(DType, bool dynamic_int8, int64_t, int) { return dynamic_int8 ? Format::int8 : Format::f32; }

void rotate_row(float* v, const GroupRotation& rotation) {
  const int group_size = rotation.layout.group_size;
  const int half = group_size / 2;
  float gathered[kMaxGroupSize];
  for (int round = 0; round < rotation.layout.rounds; ++round) {
    const uint8_t* source = rotation.source(round);
    const float* cosines = rotation.cosines(round);
    const float* sines = rotation.sines(round);
    for (int i = 0; i < group_size; ++i) gathered[i] = v[source[i]];
    for (int t = 0; t < half; ++t) {
      v[t] = cosines[t] * gathered[t] + sines[t] * gathered[half + t];
      v[half + t] = cosines[t] * gathered[half + t] - sines[t] * gathered[t];
    }
  }
  if (rotation.layout.rounds == 0) return;
  const uint8_t* source = rotation.source(rotation.layout.rounds);
  for (int i = 0; i < group_size; ++i) gathered[i] = v[source[i]];
  std::memcpy(v, gathered, sizeof(float) * group_size);
}

void finish_f32(const float* v, int group_size, uint32_t* words, float* scale, float* sum) {
  float total = 0.0f;
  for (int k = 0; k < group_size; ++k) total += v[k];
  std::memcpy(words, v, sizeof(float) * group_size);
  *scale = 1.0f;
  *sum = total;
}

void finish_int8(const float* v, int group_size, uint32_t* words, float* scale, float* sum) {
  constexpr float limit = largest_code(Format::int8);
  float largest = 0.0f;
  float poison = 0.0f; // NaN when any value is not finite, which must reach the output
  for (int k = 0; k < group_size; ++k) {
    largest = std::fmax(largest, std::fabs(v[k]));
    poison += v[k] * 0.0f;
  }
  const bool usable = poison == 0.0f && largest > kSmallestPeak;
  const float inverse = usable ? limit / largest : 0.0f;
  int total = 0;
  for (int k = 0; k < group_size; ++k) {
    const int code = usable ? static_cast<int>(std::nearbyintf(v[k] * inverse)) : 0;
    total += code;
    const int in_chunk = k % kChunk;
    auto* bytes = reinterpret_cast<int8_t*>(words + k / kChunk * words_per_chunk(Format::int8));
    bytes[in_chunk % 2 * 4 + in_chunk / 2] = static_cast<int8_t>(code);
  }
  *scale = largest / limit + poison;
  *sum = static_cast<float>(total);
}

void project(const PrepareJob& job, int64_t group, int64_t index, const float* v) {
  const int group_size = job.out.group_size;
  for (int i = 0; i < job.projection_count; ++i) {
    const Projection& to = job.projections[i];
    for (int r = 0; r < to.rank; ++r) {
      const uint16_t* down = to.down + r * to.in_features + group * group_size;
      float dot = 0.0f;
      for (int k = 0; k < group_size; ++k) dot += f16_to_float(down[k]) * v[k];
      to.parts[index * to.rank + r] = dot;
    }
  }
}

void prepare(const PrepareJob& job, int64_t group, int64_t row_begin, int64_t row_end) {
  const int group_size = job.out.group_size;
  const RotationLayout layout{group_size, job.rounds};
  const GroupRotation rotation{job.rotation ? job.rotation + group * layout.group_bytes() : nullptr, layout};
  float v[kMaxGroupSize];
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int k = 0; k < group_size; ++k) {
      v[k] = load_float(job.dtype, job.x, row * job.row_stride + group * group_size + k);
      if (job.rotation) v[k] *= rotation.channel_scales()[k];
    }
    if (job.rotation) rotate_row(v, rotation);
    const int64_t index = job.out.row_index(group, row);
    project(job, group, index, v);
    const auto finish = job.out.format == Format::int8 ? finish_int8 : finish_f32;
    finish(v, group_size, job.out.row(group, row), job.out.scale + index, job.out.sum + index);
  }
}

// The code of channel j of a chunk, from a column's words; `column` points to the first of those of the group.
uint32_t code_of(const uint8_t* column, int bits, int chunk, int j) {
  const auto part = [column](int word, int shift, int width) {
    uint32_t value;
    std::memcpy(&value, column + word * kBlockColumns * sizeof value, sizeof value);
    return value >> shift & ((1u << width) - 1);
  };
  if (bits == 4) return part(chunk, 4 * j, 4);
  if (bits == 8) return part(2 * chunk + j % 2, j / 2 * 8, 8);
  const int word = chunk / 4 * 3;
  const int within = chunk % 4;
  return part(word + within / 2, 4 * j + within % 2 * 2, 2) | part(word + 2, 4 * j + within, 1) << 2;
}

// Σ_k code[k, n] · v[k] over one group, for the 32 columns of a block.
void dot_group(const uint8_t* weight, int bits, const uint32_t* activation, Format format, int chunks, float* dot) {
  for (int n = 0; n < kBlockColumns; ++n) dot[n] = 0.0f;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    float v[kChunk];
    if (format == Format::int8) {
      const auto* bytes = reinterpret_cast<const int8_t*>(activation + chunk * words_per_chunk(format));
      for (int j = 0; j < kChunk; ++j) v[j] = bytes[j % 2 * 4 + j / 2];
    } else {
      std::memcpy(v, activation + chunk * words_per_chunk(format), sizeof v);
    }
    for (int j = 0; j < kChunk; ++j) {
      for (int n = 0; n < kBlockColumns; ++n) {
        dot[n] += static_cast<float>(code_of(weight + n * sizeof(uint32_t), bits, chunk, j)) * v[j];
      }
    }
  }
}

void multiply(const MultiplyJob& job) {
  const Activation& activation = *job.activation;
  const int chunks = activation.group_size / kChunk;
  std::memset(job.tile, 0, sizeof(float) * job.row_count * kBlockColumns);
  for (int64_t group = 0; group < activation.groups; ++group) {
    const uint8_t* weight = job.block.weight + group * chunks * kBlockColumns * job.bits;
    float scales[kBlockColumns];
    float zeros[kBlockColumns];
    for (int n = 0; n < kBlockColumns; ++n) {
      scales[n] = f16_to_float(job.block.scales[group * kBlockColumns + n]);
      zeros[n] = job.block.zeros[group * kBlockColumns + n];
    }
    for (int64_t row = 0; row < job.row_count; ++row) {
      const int64_t index = activation.row_index(group, job.row_begin + row);
      float dot[kBlockColumns];
      dot_group(weight, job.bits, activation.row(group, job.row_begin + row), activation.format, chunks, dot);
      float* out = job.tile + row * kBlockColumns;
      for (int n = 0; n < kBlockColumns; ++n) {
        out[n] += scales[n] * activation.scale[index] * (dot[n] - zeros[n] * activation.sum[index]);
      }
    }
  }
}

void store(const StoreJob& job) {
  for (int64_t row = 0; row < job.rows; ++row) {
    for (int n = 0; n < job.columns; ++n) {
      float value = job.tile[row * kBlockColumns + n] + job.bias[n];
      for (int r = 0; r < job.rank; ++r) {
        value += job.sums[row * job.rank + r] * f16_to_float(job.up[r * kBlockColumns + n]);
      }
      store_float(job.dtype, job.y, row * job.row_stride + n, value);
    }
  }
}

} // namespace

const Kernels kScalarKernels = {
    "scalar", 1, choose_format, all_groups, prepare, multiply, store, round_columns, dense_rounds};

} // namespace parofx
