// The operators of parofx_cpu on torch's stable ABI: checks, outputs, and one call.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <omp.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "calibration.h"
#include "linear.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kName = "parofx_cpu";
constexpr const char* kPack = "pack it with parofx.cpu_ops.pack_weight";

parofx::DType float_dtype(const Tensor& tensor, const char* what) {
  const ScalarType dtype = tensor.scalar_type();
  if (dtype == ScalarType::Float) return parofx::DType::f32;
  if (dtype == ScalarType::BFloat16) return parofx::DType::bf16;
  STD_TORCH_CHECK(
      dtype == ScalarType::Half, kName, ": ", what, " must be float32, bfloat16 or float16, got ",
      torch::headeronly::toString(dtype), "; convert it first");
  return parofx::DType::f16;
}

// A contiguous CPU tensor of `dtype`, as every kernel-layout argument must be.
void check_packed(const Tensor& tensor, ScalarType dtype, const char* what, size_t index) {
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.scalar_type() == dtype && tensor.is_contiguous(), kName, ": ", what, "[", index,
      "] must be a contiguous CPU tensor of ", torch::headeronly::toString(dtype), ", got ",
      torch::headeronly::toString(tensor.scalar_type()), tensor.is_contiguous() ? "" : " with strides", "; ", kPack);
}

void check_shape(const Tensor& tensor, int64_t rows, int64_t columns, const char* what, size_t index) {
  STD_TORCH_CHECK(
      tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, kName, ": ", what, "[", index,
      "] must have shape (", rows, ", ", columns, "), got ", tensor.numel(), " elements in ", tensor.dim(),
      " dimensions; ", kPack);
}

// The stride between rows of x seen as (rows, K), or -1 when its leading dimensions do not collapse to one.
int64_t collapsed_row_stride(const Tensor& x) {
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  const size_t last = sizes.size() - 1;
  if (strides[last] != 1 && sizes[last] != 1) return -1;
  int64_t row_stride = 0;
  int64_t expected = -1;
  for (size_t i = last; i-- > 0;) {
    if (sizes[i] == 1) continue;
    if (expected == -1) {
      row_stride = strides[i];
    } else if (strides[i] != expected) {
      return -1;
    }
    expected = strides[i] * sizes[i];
  }
  return row_stride;
}

parofx::Rotation read_rotation(const Tensor& blob, int64_t in_features, size_t index) {
  check_packed(blob, ScalarType::Byte, "rotations", index);
  const int64_t bytes = blob.numel();
  if (bytes == 0) return {nullptr, 0};
  // 4 bytes a channel of scales; with rounds, 5 a channel and round and 1 for the last permutation.
  const int64_t per_channel = bytes / in_features;
  const bool whole = bytes % in_features == 0 && (per_channel == 4 || (per_channel >= 10 && per_channel % 5 == 0));
  STD_TORCH_CHECK(
      whole, kName, ": rotations[", index, "] has ", bytes, " bytes, which is no rotation of ", in_features,
      " channels; pack it with parofx.cpu_ops.pack_rotation");
  const void* data = blob.data_ptr();
  STD_TORCH_CHECK(
      reinterpret_cast<uintptr_t>(data) % alignof(float) == 0, kName, ": rotations[", index,
      "] must start at a multiple of 4 bytes; clone() it");
  return {static_cast<const uint8_t*>(data), per_channel == 4 ? 0 : static_cast<int>(per_channel / 5 - 1)};
}

parofx::Linear read_linear(
    const parofx::LinearCall& call, const Tensor& weight, const Tensor& scales, const Tensor& zeros,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& down, const std::optional<Tensor>& up,
    size_t index) {
  check_packed(weight, ScalarType::Byte, "weights", index);
  check_packed(scales, ScalarType::Half, "scales", index);
  check_packed(zeros, ScalarType::Byte, "zeros", index);
  const int64_t out_features = weight.dim() == 2 ? weight.size(0) : -1;
  const int64_t groups = call.in_features / call.group_size;
  check_shape(weight, out_features, call.in_features * call.bits / 8, "weights", index);
  check_shape(scales, out_features, groups, "scales", index);
  check_shape(zeros, out_features, groups, "zeros", index);
  parofx::Linear linear{};
  linear.weight = static_cast<const uint8_t*>(weight.data_ptr());
  linear.scales = static_cast<const uint16_t*>(scales.data_ptr());
  linear.zeros = static_cast<const uint8_t*>(zeros.data_ptr());
  linear.out_features = out_features;
  if (bias) {
    linear.bias_dtype = float_dtype(*bias, "bias");
    STD_TORCH_CHECK(
        bias->is_cpu() && bias->is_contiguous() && bias->dim() == 1 && bias->size(0) == out_features, kName,
        ": biases[", index, "] must be a contiguous CPU tensor of ", out_features, " elements, got ", bias->numel());
    linear.bias = bias->data_ptr();
  }
  STD_TORCH_CHECK(
      down.has_value() == up.has_value(), kName, ": a correction needs both down and up, got one for linear ", index);
  if (down) {
    const int64_t rank = down->dim() == 2 ? down->size(0) : -1;
    for (const Tensor& half : {*down, *up}) {
      STD_TORCH_CHECK(
          half.is_cpu() && half.scalar_type() == ScalarType::Half && half.is_contiguous(), kName,
          ": down and up must be contiguous CPU tensors of Half, got ",
          torch::headeronly::toString(half.scalar_type()), " for linear ", index);
    }
    check_shape(*down, rank, call.in_features, "down", index);
    check_shape(*up, rank, out_features, "up", index);
    linear.down = static_cast<const uint16_t*>(down->data_ptr());
    linear.up = static_cast<const uint16_t*>(up->data_ptr());
    linear.rank = static_cast<int>(rank);
  }
  return linear;
}

// A new contiguous tensor of x's dtype. Calls the C shim itself: `new_empty` goes through the dispatcher, which costs
// as much as all the rest of this function.
Tensor empty_like_x(const Tensor& x, const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(shape[i], 1);
  }
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

int thread_count() {
  if (omp_in_parallel()) return 1;
  return static_cast<int>(torch::stable::get_num_threads());
}

// What does not depend on the linears. `x` is replaced by a copy where its rows have no common stride.
parofx::LinearCall begin_call(Tensor& x, int64_t bits, int64_t group_size, int64_t activation_mode) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1, kName, ": x must be a CPU tensor of shape (..., K)");
  STD_TORCH_CHECK(bits == 3 || bits == 4 || bits == 8, kName, ": bits must be 3, 4 or 8, got ", bits);
  STD_TORCH_CHECK(
      group_size == 32 || group_size == 64 || group_size == 128, kName, ": group_size must be 32, 64 or 128, got ",
      group_size, "; use the operator parofx::rotate_int4_linear");
  STD_TORCH_CHECK(
      activation_mode == 0 || activation_mode == 1, kName,
      ": activation_mode must be 0 (as x) or 1 (dynamic int8), got ", activation_mode);
  parofx::LinearCall call{};
  call.in_features = x.size(-1);
  STD_TORCH_CHECK(
      call.in_features > 0 && call.in_features % group_size == 0, kName,
      ": group_size must divide in_features: got ", group_size, " and ", call.in_features);
  call.dtype = float_dtype(x, "x");
  call.bits = static_cast<int>(bits);
  call.group_size = static_cast<int>(group_size);
  call.dynamic_int8 = activation_mode == 1;
  call.rows = x.numel() / call.in_features;
  call.row_stride = collapsed_row_stride(x);
  if (call.row_stride < 0) {
    x = torch::stable::contiguous(x);
    call.row_stride = call.in_features;
  }
  call.x = x.data_ptr();
  return call;
}

// Adds a linear to `call` and returns its output, which is yet to be computed.
Tensor add_linear(parofx::LinearCall& call, const Tensor& x, parofx::Linear linear, int rotation) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = linear.out_features;
  Tensor output = empty_like_x(x, shape);
  linear.y = output.data_ptr();
  linear.rotation = rotation;
  call.linears.push_back(linear);
  return output;
}

Tensor rotate_linear(
    Tensor x, Tensor rotation, Tensor weight, Tensor scales, Tensor zeros, std::optional<Tensor> bias, int64_t bits,
    int64_t group_size, int64_t activation_mode, std::optional<Tensor> down, std::optional<Tensor> up) {
  parofx::LinearCall call = begin_call(x, bits, group_size, activation_mode);
  call.rotations.push_back(read_rotation(rotation, call.in_features, 0));
  Tensor output = add_linear(call, x, read_linear(call, weight, scales, zeros, bias, down, up, 0), 0);
  parofx::run_linears(call, thread_count());
  return output;
}

std::vector<Tensor> rotate_int4_linear(
    Tensor x, std::vector<Tensor> rotations, std::vector<Tensor> weights, std::vector<Tensor> scales,
    std::vector<Tensor> zeros, std::vector<std::optional<Tensor>> biases, int64_t group_size,
    int64_t activation_mode, int64_t bits, std::optional<std::vector<Tensor>> down,
    std::optional<std::vector<Tensor>> up) {
  const size_t count = weights.size();
  STD_TORCH_CHECK(
      count > 0 && scales.size() == count && zeros.size() == count && biases.size() == count &&
          (rotations.size() == 1 || rotations.size() == count),
      kName, ": weights, scales, zeros and biases must have one entry per linear and rotations one, or one per linear; "
      "got ", count, ", ", scales.size(), ", ", zeros.size(), ", ", biases.size(), " and ", rotations.size());
  STD_TORCH_CHECK(
      down.has_value() == up.has_value() && (!down || (down->size() == count && up->size() == count)), kName,
      ": down and up must both be None or have one entry per linear, of ", count);
  parofx::LinearCall call = begin_call(x, bits, group_size, activation_mode);
  call.rotations.reserve(rotations.size());
  for (size_t i = 0; i < rotations.size(); ++i) {
    call.rotations.push_back(read_rotation(rotations[i], call.in_features, i));
  }
  std::vector<Tensor> outputs;
  outputs.reserve(count);
  call.linears.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    std::optional<Tensor> one_down;
    std::optional<Tensor> one_up;
    if (down) {
      one_down = (*down)[i];
      one_up = (*up)[i];
    }
    const parofx::Linear linear = read_linear(call, weights[i], scales[i], zeros[i], biases[i], one_down, one_up, i);
    outputs.push_back(add_linear(call, x, linear, rotations.size() == 1 ? 0 : static_cast<int>(i)));
  }
  parofx::run_linears(call, thread_count());
  return outputs;
}

std::string shape_of(const Tensor& tensor) {
  std::string shape = "(";
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) shape += (dim ? ", " : "") + std::to_string(tensor.size(dim));
  return shape + ")";
}

float* floats(const Tensor& tensor, int64_t rows, int64_t columns, const char* what) {
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.dim() == 2 &&
          tensor.size(0) == rows && tensor.size(1) == columns,
      kName, ": ", what, " must be a contiguous fp32 CPU tensor (", rows, ", ", columns, "), got ", shape_of(tensor),
      " of ", torch::headeronly::toString(tensor.scalar_type()), ", contiguous: ", tensor.is_contiguous());
  return static_cast<float*>(tensor.data_ptr());
}

void round_columns(
    Tensor steps, Tensor changes, Tensor base, Tensor coupling, Tensor channels, Tensor scales, Tensor low, Tensor high,
    int64_t group_size, std::optional<Tensor> exact, std::optional<Tensor> curvature) {
  STD_TORCH_CHECK(
      exact.has_value() != curvature.has_value(), kName, ": give exact for feedback, or curvature for descent, not both");
  STD_TORCH_CHECK(
      steps.dim() == 2 && group_size > 0 && steps.size(0) % group_size == 0, kName, ": steps must be (K, N) with K ",
      "divisible by group_size ", group_size, ", got ", shape_of(steps));
  const int64_t in_features = steps.size(0);
  const int64_t rows = steps.size(1);
  const int64_t groups = in_features / group_size;
  const int64_t columns = channels.numel();
  STD_TORCH_CHECK(
      columns <= parofx::kColumnsAtMost, kName, ": a block has at most ", parofx::kColumnsAtMost,
      " columns, got ", columns);
  STD_TORCH_CHECK(
      channels.is_cpu() && channels.scalar_type() == ScalarType::Long && channels.is_contiguous(), kName,
      ": channels must be a contiguous int64 CPU tensor, got ", torch::headeronly::toString(channels.scalar_type()));
  parofx::ColumnsJob job{};
  job.columns = static_cast<int>(columns);
  job.rows = rows;
  job.group_size = group_size;
  job.channels = static_cast<const int64_t*>(channels.data_ptr());
  for (int64_t column = 0; column < columns; ++column) {
    const int64_t channel = job.channels[column];
    STD_TORCH_CHECK(
        channel >= 0 && channel < in_features, kName, ": channels must be in [0, ", in_features, "), got ", channel);
  }
  job.base = floats(base, columns, rows, "base");
  job.exact = exact ? floats(*exact, columns, rows, "exact") : nullptr;
  job.coupling = floats(coupling, columns, columns, "coupling");
  job.curvature = curvature ? floats(*curvature, 1, columns, "curvature") : nullptr;
  job.scales = floats(scales, groups, rows, "scales");
  job.low = floats(low, groups, rows, "low");
  job.high = floats(high, groups, rows, "high");
  job.steps = floats(steps, in_features, rows, "steps");
  job.changes = floats(changes, columns, rows, "changes");
  parofx::run_round_columns(job, thread_count());
}

// `after` and its parts are (rounds, K, g); without `grad` it is written, with it `crossed` is.
void dense_rounds(
    Tensor after, Tensor partners, Tensor cosines, Tensor sines, std::optional<Tensor> grad,
    std::optional<Tensor> crossed) {
  STD_TORCH_CHECK(after.dim() == 3 && after.is_contiguous(), kName, ": after must be contiguous (rounds, K, g)");
  parofx::DenseRoundsJob job{};
  job.rounds = static_cast<int>(after.size(0));
  job.in_features = after.size(1);
  job.group_size = static_cast<int>(after.size(2));
  const int64_t all = job.rounds * job.in_features;
  STD_TORCH_CHECK(
      job.group_size > 0 && job.group_size <= parofx::kMaxGroupSize && job.group_size % 16 == 0 &&
          job.in_features % job.group_size == 0,
      kName, ": groups must be of a multiple of 16 and at most ", parofx::kMaxGroupSize, " channels, got ",
      job.group_size);
  STD_TORCH_CHECK(
      partners.is_cpu() && partners.scalar_type() == ScalarType::Long && partners.is_contiguous() &&
          partners.numel() == all,
      kName, ": partners must be a contiguous int64 CPU tensor of ", all, " elements, got ", partners.numel());
  job.partners = static_cast<const int64_t*>(partners.data_ptr());
  bool inside = true;
  for (int64_t group = 0; group < all / job.group_size; ++group) {
    const int64_t first = group * job.group_size % job.in_features;
    for (int64_t place = group * job.group_size; place < (group + 1) * job.group_size; ++place) {
      inside &= job.partners[place] >= first && job.partners[place] < first + job.group_size;
    }
  }
  STD_TORCH_CHECK(inside, kName, ": partners must be channels of the same group");
  job.cosines = floats(cosines, job.rounds, job.in_features, "cosines");
  job.sines = floats(sines, job.rounds, job.in_features, "sines");
  STD_TORCH_CHECK(
      after.is_cpu() && after.scalar_type() == ScalarType::Float, kName, ": after must be an fp32 CPU tensor, got ",
      torch::headeronly::toString(after.scalar_type()));
  job.after = static_cast<float*>(after.data_ptr());
  STD_TORCH_CHECK(grad.has_value() == crossed.has_value(), kName, ": give both grad and crossed, or none");
  if (grad) {
    job.grad = floats(*grad, job.in_features, job.group_size, "grad");
    job.crossed = floats(*crossed, job.rounds, job.in_features, "crossed");
  }
  parofx::run_dense_rounds(job, thread_count());
}

std::string isa() { return parofx::active_kernels().isa; }

} // namespace

STABLE_TORCH_LIBRARY(parofx_cpu, library) {
  library.def(
      "rotate_linear(Tensor x, Tensor rotation, Tensor weight, Tensor scales, Tensor zeros, Tensor? bias, int bits, "
      "int group_size, int activation_mode, Tensor? down=None, Tensor? up=None) -> Tensor");
  library.def(
      "rotate_int4_linear(Tensor x, Tensor[] rotations, Tensor[] weights, Tensor[] scales, Tensor[] zeros, "
      "Tensor?[] biases, int group_size, int activation_mode, int bits=4, "
      "Tensor[]? down=None, Tensor[]? up=None) -> Tensor[]");
  library.def(
      "round_columns(Tensor(a!) steps, Tensor(b!) changes, Tensor base, Tensor coupling, Tensor channels, Tensor scales, "
      "Tensor low, Tensor high, int group_size, Tensor? exact=None, Tensor? curvature=None) -> ()");
  library.def(
      "dense_rounds(Tensor(a!) after, Tensor partners, Tensor cosines, Tensor sines, Tensor? grad=None, "
      "Tensor(b!)? crossed=None) -> ()");
  library.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(parofx_cpu, CPU, library) {
  library.impl("rotate_linear", TORCH_BOX(&rotate_linear));
  library.impl("rotate_int4_linear", TORCH_BOX(&rotate_int4_linear));
  library.impl("round_columns", TORCH_BOX(&round_columns));
  library.impl("dense_rounds", TORCH_BOX(&dense_rounds));
}

STABLE_TORCH_LIBRARY_IMPL(parofx_cpu, CompositeExplicitAutograd, library) { library.impl("isa", TORCH_BOX(&isa)); }
