// What calibration does most, on at most `threads` threads of the caller's OpenMP runtime.
#pragma once

#include "kernels.h"

namespace parofx {

// Rounds one block of a weight's columns.
void run_round_columns(const ColumnsJob& job, int threads);

// Multiplies the rounds of a rotation, or takes their gradient.
void run_dense_rounds(const DenseRoundsJob& job, int threads);

} // namespace parofx
