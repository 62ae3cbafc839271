// The columns of one block of a weight, rounded one after the other: error feedback and coordinate descent.
// Everything has internal linkage: files compiled for different instruction sets must not share inline code.
#pragma once

#include <cmath>

#include "kernels.h"

namespace parofx {
namespace {

template <bool kDescent>
void round_tile(const ColumnsJob& job, int64_t first, int rows) {
  alignas(64) float changes[kColumnsAtMost][kRowsOfColumns]; // zeros past the last row
  for (int turn = 0; turn < job.columns; ++turn) {
    const int column = kDescent ? turn : job.columns - 1 - turn;
    const float* coupling = job.coupling + column * job.columns;
    alignas(64) float taken_over[kRowsOfColumns] = {};
    for (int earlier = 0; earlier < turn; ++earlier) {
      const float factor = coupling[kDescent ? earlier : job.columns - 1 - earlier];
      for (int row = 0; row < kRowsOfColumns; ++row) taken_over[row] += factor * changes[earlier][row];
    }
    const int64_t channel = job.channels[column];
    const int64_t grid = channel / job.group_size * job.rows + first;
    const float* scales = job.scales + grid;
    const float* low = job.low + grid;
    const float* high = job.high + grid;
    const float* base = job.base + column * job.rows + first;
    float* steps = job.steps + channel * job.rows + first;
    float* out = job.changes + column * job.rows + first;
    for (int row = 0; row < rows; ++row) {
      const float value = base[row] + taken_over[row];
      const float wanted = kDescent ? steps[row] + value / (scales[row] * job.curvature[column]) : value / scales[row];
      const float nearest = std::nearbyintf(wanted);
      // Comparisons, not fmin and fmax: NaN stays NaN.
      const float above = nearest < low[row] ? low[row] : nearest;
      const float best = above > high[row] ? high[row] : above;
      const float change =
          kDescent ? (best - steps[row]) * scales[row] : job.exact[column * job.rows + first + row] - best * scales[row];
      steps[row] = best;
      changes[turn][row] = change;
      out[row] = change;
    }
    for (int row = rows; row < kRowsOfColumns; ++row) changes[turn][row] = 0.0f;
  }
}

inline void round_columns(const ColumnsJob& job, int64_t first, int rows) {
  job.curvature ? round_tile<true>(job, first, rows) : round_tile<false>(job, first, rows);
}

} // namespace
} // namespace parofx
