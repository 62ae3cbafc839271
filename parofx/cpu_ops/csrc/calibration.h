// What calibration does most, on at most `threads` threads of the caller's OpenMP runtime.
#pragma once

#include "kernels.h"

namespace parofx {

// Rounds one block of a weight's columns.
void run_rounding(const RoundingJob& job, int threads);

// Multiplies the rounds of a rotation, or takes their gradient.
void run_rounds(const RoundsJob& job, int threads);

} // namespace parofx
