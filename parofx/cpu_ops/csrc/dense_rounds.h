// The rotation rounds of one group as a dense matrix, and their gradient: what fitting angles does in every step.
// Everything has internal linkage: files compiled for different instruction sets must not share inline code.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace parofx {
namespace {

inline void rounds_forward(const DenseRoundsJob& job, int64_t group) {
  const int g = job.group_size;
  const int64_t first = group * g;
  for (int round = 0; round < job.rounds; ++round) {
    const int64_t row = round * job.in_features;
    float* after = job.after + row * g;
    const float* before = round ? after - job.in_features * g : nullptr;
    for (int64_t channel = first; channel < first + g; ++channel) {
      const int64_t partner = job.partners[row + channel];
      const float cosine = job.cosines[row + channel];
      const float sine = job.sines[row + channel];
      float* out = after + channel * g;
      if (!before) {
        std::fill(out, out + g, 0.0f);
        out[channel - first] += cosine;
        out[partner - first] += sine;
        continue;
      }
      const float* own = before + channel * g;
      const float* other = before + partner * g;
      for (int k = 0; k < g; ++k) out[k] = cosine * own[k] + sine * other[k];
    }
  }
}

inline void rounds_backward(const DenseRoundsJob& job, int64_t group, float* workspace) {
  const int g = job.group_size;
  const int64_t first = group * g;
  const float* grad = job.grad + first * g;
  for (int round = job.rounds - 1; round >= 0; --round) {
    const int64_t row = round * job.in_features + first;
    const float* after = job.after + row * g;
    float* rotated_back = workspace + round % 2 * g * g;
    for (int channel = 0; channel < g; ++channel) {
      const int64_t partner = job.partners[row + channel] - first;
      const float* own = grad + channel * g;
      const float* other = grad + partner * g;
      const float* value = after + partner * g;
      constexpr int kLanes = 16; // sums side by side, so that they can be vectors
      float sums[kLanes] = {};
      for (int k = 0; k < g; k += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) sums[lane] += value[k + lane] * own[k + lane];
      }
      float sum = 0.0f;
      for (const float one : sums) sum += one;
      job.crossed[row + channel] = sum;
      const float cosine = job.cosines[row + channel];
      const float sine = job.sines[row + channel];
      float* out = rotated_back + channel * g;
      for (int k = 0; k < g; ++k) out[k] = cosine * own[k] - sine * other[k];
    }
    grad = rotated_back;
  }
}

inline void dense_rounds(const DenseRoundsJob& job, int64_t group, float* workspace) {
  job.grad ? rounds_backward(job, group, workspace) : rounds_forward(job, group);
}

} // namespace
} // namespace parofx
