// One call: linears that read the same x, from packed tensors to finished outputs. Knows nothing of torch.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace parofx {

// Kernel-layout bytes of one rotation; null data means neither channel scales nor rounds.
struct Rotation {
  const uint8_t* data;
  int rounds;
};

struct Linear {
  const uint8_t* weight;
  const uint16_t* scales;
  const uint8_t* zeros;
  const void* bias; // null: none
  DType bias_dtype;
  // A low-rank correction, (x_rot · downᵀ) · up, in fp16: down (rank, in_features), up (rank, out_features).
  const uint16_t* down;
  const uint16_t* up;
  int rank; // 0: none
  int64_t out_features;
  int rotation; // index into LinearCall::rotations
  void* y;      // (rows, out_features), contiguous, x's dtype
};

struct LinearCall {
  const void* x; // (rows, in_features), unit stride along in_features
  int64_t row_stride;
  DType dtype;
  int64_t rows;
  int64_t in_features;
  int bits; // of a weight: 3, 4 or 8
  int group_size;
  bool dynamic_int8;
  std::vector<Rotation> rotations;
  std::vector<Linear> linears;
};

// Computes every linear of `call` on at most `threads` threads of the caller's OpenMP runtime.
void run_linears(const LinearCall& call, int threads);

} // namespace parofx
