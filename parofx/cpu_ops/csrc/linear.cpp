// Splits one call over threads: first rotate and convert every (rotation, group, rows) once, and project it for low-rank
// corrections, then, behind a barrier, multiply every (rows, linear, block of 32 columns).
#include "linear.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "numeric.h"

namespace parofx {
namespace {

constexpr int64_t kAlignment = 64;
// Bytes between what two threads write: where they are closer, one core prefetches lines that the other is writing.
constexpr int64_t kApart = 4096;
// Blocks that take turns where one part of the activations follows another: their fp32 outputs stay in the L2 cache.
constexpr int64_t kStripBlocks = 16;
// Fewer rows than this are not worth decoding a block for.
constexpr int64_t kSmallestPanel = 24;
// Multiply-adds that are worth one more thread (about 2 µs of work).
constexpr int64_t kWorkPerThread = 1 << 17;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Hands out aligned pieces of one allocation; run it once with no memory to learn the size.
class Carver {
 public:
  explicit Carver(uint8_t* base) : base_(base) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), kAlignment) * kAlignment;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  uint8_t* base_;
  int64_t used_ = 0;
};

struct FreeDeleter {
  void operator()(uint8_t* data) const { std::free(data); }
};

// The columns of one block and the rows of one panel, and where they lie.
struct Place {
  const Linear* linear;
  int64_t column;
  int columns;
  int64_t panel;
  int64_t row;
  int64_t rows;
};

// What one thread needs to itself.
struct Workspace {
  float* tiles; // one for each block of a strip
  uint32_t* unpacked;
  uint8_t* nibbles;
  float* bias;
  // The corrections' projections of the rows at hand, [rows][rank], and for which linear and panel they are.
  float* sums;
  const Linear* summed_linear;
  int64_t summed_panel;
  uint16_t* up; // [rank][32]
  // The narrow last block of a linear, widened to 32 columns.
  uint8_t* weight;
  uint16_t* scales;
  uint8_t* zeros;
};

class Run {
 public:
  Run(const LinearCall& call, int threads) : call_(call), kernels_(active_kernels()), groups_(call.in_features / call.group_size) {
    for (const Linear& linear : call.linears) {
      first_block_.push_back(blocks_);
      blocks_ += ceil_div(linear.out_features, kBlockColumns);
      widest_tail_ = widest_tail_ || linear.out_features % kBlockColumns != 0;
      highest_rank_ = std::max(highest_rank_, linear.rank);
    }
    threads_ = choose_threads(threads);
    const Format format = kernels_.format(call.dtype, call.dynamic_int8, call.rows, call.bits);
    const int64_t multiple = format == Format::bf16_tiles ? kTileRows : 1;
    activation_ = {format, call.group_size, ceil_div(call.rows, multiple) * multiple, groups_, nullptr, nullptr, nullptr};
    const Blocking blocking = kernels_.blocking(activation_);
    row_multiple_ = blocking.row_multiple;
    groups_at_once_ = blocking.groups;
    strip_blocks_ = blocking.groups < groups_ ? kStripBlocks : 1;
    row_panels_ = std::max<int64_t>(1, choose_row_panels(blocking.rows));
    panel_rows_ = ceil_div(ceil_div(call.rows, row_multiple_), row_panels_) * row_multiple_;
    tile_floats_ = (panel_rows_ + kPaddingRows) * kBlockColumns;
    Carver measure(nullptr);
    carve(measure);
    memory_.reset(static_cast<uint8_t*>(std::aligned_alloc(kAlignment, std::max(measure.used(), kAlignment))));
    if (!memory_) throw std::bad_alloc();
    Carver carver(memory_.get());
    carve(carver);
  }

  void operator()() {
#pragma omp parallel num_threads(threads_)
    {
      const int thread = omp_get_thread_num();
      const int count = omp_get_num_threads();
      prepare_share(thread, count);
#pragma omp barrier
      multiply_share(thread, count, workspaces_[thread]);
    }
  }

 private:
  int choose_threads(int threads) const {
    const int64_t work = call_.rows * call_.in_features * blocks_ * kBlockColumns;
    return static_cast<int>(std::clamp<int64_t>(work / kWorkPerThread, 1, threads));
  }

  // Nearly equal panels; more of them where there are too few blocks to occupy every thread.
  int64_t choose_row_panels(int64_t most_rows) const {
    const int64_t wanted = ceil_div(4 * threads_, blocks_);
    return std::max(ceil_div(call_.rows, most_rows), std::min(wanted, call_.rows / std::max(kSmallestPanel, row_multiple_)));
  }

  void carve(Carver& carver) {
    activations_.clear();
    for (size_t i = 0; i < call_.rotations.size(); ++i) {
      Activation activation = activation_;
      const int64_t count = groups_ * activation.rows;
      activation.words = carver.take<uint32_t>((count + kPaddingRows) * activation.row_words());
      activation.scale = carver.take<float>(count);
      activation.sum = carver.take<float>(count);
      activations_.push_back(activation);
    }
    projections_.assign(call_.rotations.size(), {});
    projected_.clear();
    for (const Linear& linear : call_.linears) {
      projected_.push_back(carver.take<float>(groups_ * activation_.rows * linear.rank));
      if (linear.rank == 0) continue;
      projections_[linear.rotation].push_back({linear.down, call_.in_features, linear.rank, projected_.back()});
    }
    workspaces_.clear();
    const int64_t tail = widest_tail_ ? kBlockColumns * groups_ : 0;
    for (int i = 0; i < threads_; ++i) {
      carver.take<uint8_t>(kApart);
      Workspace space{};
      space.tiles = carver.take<float>(strip_blocks_ * tile_floats_);
      space.unpacked = carver.take<uint32_t>(kUnpackedWords);
      space.nibbles = carver.take<uint8_t>(call_.bits == 3 ? kBlockColumns / 2 * int64_t{call_.group_size} : 0);
      space.bias = carver.take<float>(kBlockColumns);
      space.sums = carver.take<float>(panel_rows_ * highest_rank_);
      space.up = carver.take<uint16_t>(int64_t{kBlockColumns} * highest_rank_);
      space.weight = carver.take<uint8_t>(tail * call_.group_size * call_.bits / 8);
      space.scales = carver.take<uint16_t>(tail);
      space.zeros = carver.take<uint8_t>(tail);
      workspaces_.push_back(space);
    }
  }

  void prepare_share(int thread, int count) const {
    const int64_t row_tiles = ceil_div(call_.rows, kernels_.row_tile);
    const int64_t per_rotation = groups_ * row_tiles;
    const int64_t units = per_rotation * static_cast<int64_t>(call_.rotations.size());
    for (int64_t unit = units * thread / count; unit < units * (thread + 1) / count; ++unit) {
      const int64_t which = unit / per_rotation;
      const int64_t group = unit % per_rotation / row_tiles;
      const int64_t row = unit % row_tiles * kernels_.row_tile;
      const Rotation& rotation = call_.rotations[which];
      const std::vector<Projection>& projections = projections_[which];
      const PrepareJob job{
          call_.x, call_.row_stride, call_.dtype, rotation.data, rotation.rounds, activations_[which],
          projections.data(), static_cast<int>(projections.size())};
      kernels_.prepare(job, group, row, std::min(row + kernels_.row_tile, call_.rows));
    }
  }

  void multiply_share(int thread, int count, Workspace& space) const {
    const int64_t units = row_panels_ * blocks_;
    const int64_t end = units * (thread + 1) / count;
    for (int64_t begin = units * thread / count, next; begin < end; begin = next) {
      next = std::min({end, begin + strip_blocks_, (begin / blocks_ + 1) * blocks_});
      for (int64_t group = 0; group < groups_; group += groups_at_once_) {
        for (int64_t unit = begin; unit < next; ++unit) {
          multiply_part(place(unit), group, space.tiles + (unit - begin) * tile_floats_, space);
        }
      }
      for (int64_t unit = begin; unit < next; ++unit) {
        store(place(unit), space.tiles + (unit - begin) * tile_floats_, space);
      }
    }
  }

  Place place(int64_t unit) const {
    const int64_t block = unit % blocks_;
    const auto after = std::upper_bound(first_block_.begin(), first_block_.end(), block);
    const auto which = after - first_block_.begin() - 1;
    const Linear& linear = call_.linears[which];
    const int64_t column = (block - first_block_[which]) * kBlockColumns;
    const int columns = static_cast<int>(std::min<int64_t>(kBlockColumns, linear.out_features - column));
    const int64_t panel = unit / blocks_;
    const int64_t multiples = ceil_div(call_.rows, row_multiple_);
    const auto first_row = [&](int64_t of) { return std::min(multiples * of / row_panels_ * row_multiple_, call_.rows); };
    return {&linear, column, columns, panel, first_row(panel), first_row(panel + 1) - first_row(panel)};
  }

  void multiply_part(const Place& place, int64_t group, float* tile, const Workspace& space) const {
    const Linear& linear = *place.linear;
    Block packed{
        linear.weight + place.column * call_.in_features * call_.bits / 8,
        linear.scales + place.column * groups_,
        linear.zeros + place.column * groups_,
    };
    if (place.columns < kBlockColumns) packed = widen(packed, place.columns, space);
    const int64_t group_end = std::min(group + groups_at_once_, groups_);
    kernels_.multiply(
        {&activations_[linear.rotation], packed, call_.bits, place.row, place.rows, group, group_end, tile,
         space.unpacked, space.nibbles});
  }

  void store(const Place& place, float* tile, Workspace& space) const {
    const Linear& linear = *place.linear;
    for (int n = 0; n < kBlockColumns; ++n) {
      const bool has_bias = linear.bias && n < place.columns;
      space.bias[n] = has_bias ? load_float(linear.bias_dtype, linear.bias, place.column + n) : 0.0f;
    }
    correct(place, space);
    const int64_t element = call_.dtype == DType::f32 ? 4 : 2;
    auto* y = static_cast<uint8_t*>(linear.y) + (place.row * linear.out_features + place.column) * element;
    kernels_.store(
        {tile, place.rows, place.columns, space.bias, linear.rank, space.sums, space.up, call_.dtype, y,
         linear.out_features});
  }

  // Prepares the correction of one block: its columns of `up`, and the sums over groups of the panel's projections.
  void correct(const Place& place, Workspace& space) const {
    const Linear& linear = *place.linear;
    if (linear.rank == 0) return;
    widen_rows<uint16_t>(linear.up + place.column, space.up, linear.rank, place.columns, linear.out_features);
    if (space.summed_linear == &linear && space.summed_panel == place.panel) return;
    space.summed_linear = &linear;
    space.summed_panel = place.panel;
    const int64_t count = place.rows * linear.rank;
    std::memset(space.sums, 0, sizeof(float) * count);
    for (int64_t group = 0; group < groups_; ++group) {
      const float* parts = projected_[&linear - call_.linears.data()] + (group * activation_.rows + place.row) * linear.rank;
      for (int64_t i = 0; i < count; ++i) space.sums[i] += parts[i];
    }
  }

  // Copies a narrow block to full width; the added columns have scale 0.
  Block widen(const Block& narrow, int columns, const Workspace& space) const {
    const int64_t word_rows = call_.in_features * call_.bits / 32;
    widen_rows<uint32_t>(narrow.weight, space.weight, word_rows, columns, columns);
    widen_rows<uint16_t>(narrow.scales, space.scales, groups_, columns, columns);
    widen_rows<uint8_t>(narrow.zeros, space.zeros, groups_, columns, columns);
    return {space.weight, space.scales, space.zeros};
  }

  template <class T>
  static void widen_rows(const void* from, void* to, int64_t rows, int columns, int64_t row_stride) {
    for (int64_t row = 0; row < rows; ++row) {
      T* out = static_cast<T*>(to) + row * kBlockColumns;
      std::memcpy(out, static_cast<const T*>(from) + row * row_stride, columns * sizeof(T));
      std::memset(out + columns, 0, (kBlockColumns - columns) * sizeof(T));
    }
  }

  const LinearCall& call_;
  const Kernels& kernels_;
  const int64_t groups_;
  int64_t blocks_ = 0;
  std::vector<int64_t> first_block_;
  bool widest_tail_ = false;
  int highest_rank_ = 0;
  int threads_ = 1;
  Activation activation_; // of every rotation, without its memory
  int64_t groups_at_once_ = 0;
  int64_t strip_blocks_ = 1;
  int64_t row_panels_ = 1;
  int64_t row_multiple_ = 1;
  int64_t panel_rows_ = 0; // at most
  int64_t tile_floats_ = 0;
  std::unique_ptr<uint8_t, FreeDeleter> memory_;
  std::vector<Activation> activations_;
  std::vector<std::vector<Projection>> projections_; // of each rotation's linears
  std::vector<float*> projected_;                    // of each linear
  std::vector<Workspace> workspaces_;
};

} // namespace

void run_linears(const LinearCall& call, int threads) {
  const auto is_empty = [](const Linear& linear) { return linear.out_features == 0; };
  if (call.rows == 0 || std::all_of(call.linears.begin(), call.linears.end(), is_empty)) return;
  Run run(call, threads);
  run();
}

} // namespace parofx
