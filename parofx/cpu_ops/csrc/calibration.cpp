// Splits calibration's work among threads.
#include "calibration.h"

#include <algorithm>

namespace parofx {

void run_rounding(const RoundingJob& job, int threads) {
  const Kernels& kernels = active_kernels();
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < job.rows; first += kRoundingRows) {
    kernels.round(job, first, static_cast<int>(std::min<int64_t>(kRoundingRows, job.rows - first)));
  }
}

void run_rounds(const RoundsJob& job, int threads) {
  const Kernels& kernels = active_kernels();
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t group = 0; group < job.in_features / job.group_size; ++group) kernels.rounds(job, group);
}

} // namespace parofx
