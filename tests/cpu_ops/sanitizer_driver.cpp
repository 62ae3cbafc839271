// Runs every instruction set that this machine has on exactly sized heap buffers, so that AddressSanitizer sees each
// byte read or written outside of them, and compares each with the scalar kernels. Prints the sets it ran.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <random>
#include <vector>

#include "calibration.h"
#include "linear.h"
#include "numeric.h"

namespace {

std::mt19937 generator(1);

template <class T>
std::vector<T> random_values(size_t count, int limit) {
  std::vector<T> values(count);
  for (T& value : values) value = static_cast<T>(generator() % limit);
  return values;
}

struct Tensors {
  std::vector<uint8_t> weight, zeros;
  std::vector<uint16_t> scales, bias, down, up, y;
};

// The blob of `rounds` rounds whose sources are rotations by one place, with cos = 0.6 and sin = 0.8.
std::vector<uint8_t> rotation_blob(int64_t groups, int group_size, int rounds) {
  const parofx::RotationLayout layout{group_size, rounds};
  std::vector<uint8_t> blob(groups * layout.group_bytes());
  for (int64_t group = 0; group < groups; ++group) {
    uint8_t* data = blob.data() + group * layout.group_bytes();
    const parofx::GroupRotation rotation{data, layout};
    const auto fill = [](const float* where, int count, float value) {
      for (int i = 0; i < count; ++i) std::memcpy(const_cast<float*>(where) + i, &value, sizeof value);
    };
    fill(rotation.channel_scales(), group_size, 0.5f);
    for (int round = 0; round <= rounds && rounds > 0; ++round) {
      for (int i = 0; i < group_size; ++i) {
        const_cast<uint8_t*>(rotation.source(round))[i] = static_cast<uint8_t>((i + 1) % group_size);
      }
      if (round == rounds) break;
      fill(rotation.cosines(round), group_size / 2, 0.6f);
      fill(rotation.sines(round), group_size / 2, 0.8f);
    }
  }
  return blob;
}

std::vector<float> run(
    int linears, int bits, int64_t rows, int64_t in_features, int group_size, int rounds, bool dynamic_int8,
    int threads) {
  generator.seed(7);
  const int64_t groups = in_features / group_size;
  std::vector<uint16_t> x(rows * in_features);
  for (uint16_t& value : x) value = parofx::float_to_bf16(static_cast<float>(generator() % 2001) / 1000.0f - 1.0f);
  const std::vector<uint8_t> blob = rotation_blob(groups, group_size, rounds);

  parofx::LinearCall call{};
  call.x = x.data();
  call.row_stride = in_features;
  call.dtype = parofx::DType::bf16;
  call.rows = rows;
  call.in_features = in_features;
  call.bits = bits;
  call.group_size = group_size;
  call.dynamic_int8 = dynamic_int8;
  call.rotations = {{blob.data(), rounds}, {nullptr, 0}, {blob.data(), rounds}};
  call.rotations.resize(linears);
  std::vector<Tensors> all(linears);
  const int64_t widths[] = {64, 40, 1};
  for (int i = 0; i < linears; ++i) {
    Tensors& tensors = all[i];
    const int64_t columns = widths[i];
    tensors.weight = random_values<uint8_t>(columns * in_features * bits / 8, 256);
    tensors.zeros = random_values<uint8_t>(columns * groups, 1 << bits);
    tensors.scales.assign(columns * groups, parofx::float_to_f16(bits == 8 ? 0.000625f : 0.01f));
    tensors.bias.assign(columns, parofx::float_to_f16(0.25f));
    // The second of siblings has no correction.
    const int rank = i == 1 ? 0 : 5;
    tensors.down.assign(rank * in_features, parofx::float_to_f16(0.01f));
    tensors.up.assign(rank * columns, parofx::float_to_f16(0.5f));
    tensors.y.assign(rows * columns, 0xffff);
    parofx::Linear linear{};
    linear.weight = tensors.weight.data();
    linear.zeros = tensors.zeros.data();
    linear.scales = tensors.scales.data();
    linear.bias = i == 1 ? nullptr : tensors.bias.data();
    linear.bias_dtype = parofx::DType::f16;
    linear.down = tensors.down.data();
    linear.up = tensors.up.data();
    linear.rank = rank;
    linear.out_features = columns;
    linear.rotation = i;
    linear.y = tensors.y.data();
    call.linears.push_back(linear);
  }
  parofx::run_linears(call, threads);
  std::vector<float> result;
  for (const Tensors& tensors : all) {
    for (const uint16_t value : tensors.y) result.push_back(parofx::bf16_to_float(value));
  }
  return result;
}

// How many changes a block of columns left unwritten, or beyond what its grid makes of its inputs.
int round_block(int columns, int64_t rows, bool descent) {
  const int64_t group_size = 32;
  const int64_t groups = 5;
  const auto random = [](size_t count, float scale) {
    std::vector<float> values(count);
    for (float& value : values) value = scale * (static_cast<float>(generator() % 2001) / 1000.0f - 1.0f);
    return values;
  };
  std::vector<int64_t> channels(columns);
  for (int column = 0; column < columns; ++column) channels[column] = groups * group_size - 1 - column;
  const std::vector<float> base = random(columns * rows, 1.0f);
  const std::vector<float> exact = random(columns * rows, 1.0f);
  const std::vector<float> coupling = random(columns * columns, 0.1f);
  const std::vector<float> curvature(columns, 1.5f);
  const std::vector<float> scales(groups * rows, 0.1f);
  const std::vector<float> low(groups * rows, -7.0f);
  const std::vector<float> high(groups * rows, 8.0f);
  std::vector<float> steps(groups * group_size * rows, 1.0f);
  std::vector<float> changes(columns * rows, NAN);
  parofx::ColumnsJob job{};
  job.columns = columns;
  job.rows = rows;
  job.group_size = group_size;
  job.channels = channels.data();
  job.base = base.data();
  job.exact = descent ? nullptr : exact.data();
  job.coupling = coupling.data();
  job.curvature = descent ? curvature.data() : nullptr;
  job.scales = scales.data();
  job.low = low.data();
  job.high = high.data();
  job.steps = steps.data();
  job.changes = changes.data();
  parofx::run_round_columns(job, 2);
  int wrong = 0;
  for (const float change : changes) wrong += !(std::fabs(change) <= 2.0f);
  for (const float step : steps) wrong += !(step >= -7.0f && step <= 8.0f);
  return wrong;
}

// How many entries of dense rounds and of their gradient were left unwritten; rotations keep the length of the rows.
int multiply_rounds(int group_size, int rounds) {
  const int64_t in_features = 3 * group_size;
  std::vector<int64_t> partners(rounds * in_features);
  for (int64_t i = 0; i < rounds * in_features; ++i) partners[i] = i % in_features ^ 1;
  const std::vector<float> cosines(rounds * in_features, 0.6f);
  std::vector<float> sines(rounds * in_features);
  for (int64_t i = 0; i < rounds * in_features; ++i) sines[i] = i % 2 ? -0.8f : 0.8f;
  std::vector<float> after(rounds * in_features * group_size, NAN);
  const std::vector<float> grad(in_features * group_size, 1.0f);
  std::vector<float> crossed(rounds * in_features, NAN);
  parofx::DenseRoundsJob job{};
  job.rounds = rounds;
  job.group_size = group_size;
  job.in_features = in_features;
  job.partners = partners.data();
  job.cosines = cosines.data();
  job.sines = sines.data();
  job.after = after.data();
  parofx::run_dense_rounds(job, 2);
  job.grad = grad.data();
  job.crossed = crossed.data();
  parofx::run_dense_rounds(job, 2);
  int wrong = 0;
  for (size_t row = 0; row < after.size(); row += group_size) {
    float squares = 0.0f;
    for (int k = 0; k < group_size; ++k) squares += after[row + k] * after[row + k];
    wrong += !(std::fabs(squares - 1.0f) < 1e-4f);
  }
  for (const float one : crossed) wrong += !std::isfinite(one);
  return wrong;
}

} // namespace

// argv[1]: "scalar" writes the answers to argv[2]; anything else compares with that file.
int main(int, char** arguments) {
  const bool writes = std::strcmp(arguments[1], "scalar") == 0;
  std::FILE* file = std::fopen(arguments[2], writes ? "wb" : "rb");
  int failures = 0;
  for (const int group_size : {32, 64, 128}) {
    for (const int rounds : {0, 1, 8}) {
      for (const int64_t rows : {1, 2, 3, 5, 8, 9, 14, 17, 49, 300}) {
        for (const int mode : {0, 1, 2, 3, 4, 5}) {
          const int bits = mode < 2 ? 4 : mode < 4 ? 8 : 3;
          const int linears = rows % 2 == 0 ? 3 : 1;
          const auto answer =
              run(linears, bits, rows, 3 * group_size, group_size, rounds, mode % 2 == 1, 1 + rows % 3);
          if (writes) {
            std::fwrite(answer.data(), sizeof(float), answer.size(), file);
            continue;
          }
          std::vector<float> expected(answer.size());
          if (std::fread(expected.data(), sizeof(float), expected.size(), file) != expected.size()) return 2;
          for (size_t i = 0; i < answer.size(); ++i) {
            // bf16 rounds both the activations and the outputs; int8 codes may fall on either side of a half.
            if (!(std::fabs(answer[i] - expected[i]) <= 0.05f + 0.02f * std::fabs(expected[i]))) ++failures;
          }
        }
      }
    }
  }
  std::fclose(file);
  for (const int group_size : {16, 32, 128}) {
    for (const int rounds : {1, 2, 8}) failures += multiply_rounds(group_size, rounds);
  }
  for (const int columns : {1, 31, 128}) {
    for (const int64_t rows : {1, 63, 64, 65, 200}) {
      failures += round_block(columns, rows, false) + round_block(columns, rows, true);
    }
  }
  std::printf("%s %d\n", parofx::active_kernels().isa, failures);
  return failures != 0;
}
