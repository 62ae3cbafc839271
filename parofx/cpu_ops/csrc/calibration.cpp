// Splits calibration's work among threads.
#include "calibration.h"

#include <omp.h>

#include <algorithm>
#include <vector>

namespace parofx {

void run_round_columns(const ColumnsJob& job, int threads) {
  const Kernels& kernels = active_kernels();
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < job.rows; first += kRowsOfColumns) {
    const int64_t rows = std::min<int64_t>(kRowsOfColumns, job.rows - first);
    kernels.round_columns(job, first, static_cast<int>(rows));
  }
}

void run_dense_rounds(const DenseRoundsJob& job, int threads) {
  const Kernels& kernels = active_kernels();
  const int64_t each = job.workspace_size();
  std::vector<float> workspaces(threads * each); // threads may have small stacks
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t group = 0; group < job.in_features / job.group_size; ++group) {
    kernels.dense_rounds(job, group, workspaces.data() + omp_get_thread_num() * each);
  }
}

} // namespace parofx
