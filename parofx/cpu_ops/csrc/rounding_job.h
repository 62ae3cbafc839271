// Rounds one block of a weight's columns, on at most `threads` threads of the caller's OpenMP runtime.
#pragma once

#include "kernels.h"

namespace parofx {

void run_rounding(const RoundingJob& job, int threads);

} // namespace parofx
