// Chooses the kernels once per process, by CPUID or by PAROFX_CPU_ISA.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace parofx {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool (*supported)();
};

#if defined(PAROFX_X86)
// These also ask the operating system whether it saves the wide registers.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}

bool has_amx() {
  return has_avx512_bf16() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
      __builtin_cpu_supports("amx-int8") && enable_amx();
}
#endif

bool always() { return true; }

// Fastest first.
const Candidate kCandidates[] = {
#if defined(PAROFX_X86)
    {&kAmxKernels, has_amx},
    {&kAvx512Bf16Kernels, has_avx512_bf16},
    {&kAvx512Kernels, has_avx512},
    {&kAvx2Kernels, has_avx2},
#endif
    {&kScalarKernels, always},
};

const Kernels& choose() {
  const char* forced = std::getenv("PAROFX_CPU_ISA");
  std::string known;
  std::string supported;
  for (const Candidate& candidate : kCandidates) {
    const std::string name = candidate.kernels->isa;
    known += (known.empty() ? "" : ", ") + name;
    if (!candidate.supported()) {
      if (forced && name == forced) {
        throw std::runtime_error("PAROFX_CPU_ISA: this machine has no " + name + "; unset PAROFX_CPU_ISA");
      }
      continue;
    }
    if (!forced || !*forced || name == forced) return *candidate.kernels;
    supported += (supported.empty() ? "" : ", ") + name;
  }
  throw std::runtime_error(
      "PAROFX_CPU_ISA: expected one of " + known + ", got '" + forced + "'; this machine runs " + supported);
}

} // namespace

const Kernels& active_kernels() {
  static const Kernels& kernels = choose();
  return kernels;
}

} // namespace parofx
