// Splits the rows of a rounding job among threads.
#include "rounding_job.h"

#include <algorithm>

namespace parofx {

void run_rounding(const RoundingJob& job, int threads) {
  const Kernels& kernels = active_kernels();
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < job.rows; first += kRoundingRows) {
    kernels.round(job, first, static_cast<int>(std::min<int64_t>(kRoundingRows, job.rows - first)));
  }
}

} // namespace parofx
