// Chooses the instruction set at run time. Compiled for the plainest processor.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fastmaml {

#define FASTMAML_DECLARE_TABLE(isa) \
  namespace isa {                   \
  template <typename T>             \
  const Kernels<T>& table();        \
  }
#ifdef FASTMAML_X86
FASTMAML_DECLARE_TABLE(avx512)
FASTMAML_DECLARE_TABLE(avx2)
#endif
#ifdef FASTMAML_ARM64
FASTMAML_DECLARE_TABLE(neon)
#endif
FASTMAML_DECLARE_TABLE(portable)

void throw_label_out_of_range(Index row, std::int64_t label, Index columns) {
  throw std::invalid_argument("labels must lie in [0, " + std::to_string(columns) + "), got " +
                              std::to_string(label) + " at example " + std::to_string(row));
}

std::vector<std::string> runnable_isas() {
  std::vector<std::string> isas;
#ifdef FASTMAML_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    isas.push_back("avx512");
  }
  if (avx2) isas.push_back("avx2");
#endif
#ifdef FASTMAML_ARM64
  isas.push_back("neon");  // every one of them has it
#endif
  isas.push_back("portable");
  return isas;
}

namespace {

std::string chosen_isa() {
  const std::vector<std::string> runnable = runnable_isas();
  const char* wanted = std::getenv("FASTMAML_ISA");
  if (!wanted || !*wanted) return runnable.front();
  std::string names;
  for (const std::string& isa : runnable) {
    if (isa == wanted) return isa;
    names += names.empty() ? isa : ", " + isa;
  }
  throw std::invalid_argument(
      "FASTMAML_ISA must name an instruction set that this processor runs (" + names + "), got \"" +
      wanted + "\"; unset it for the best one");
}

}  // namespace

template <typename T>
const Kernels<T>& kernels_for(const std::string& isa) {
#ifdef FASTMAML_X86
  if (isa == "avx512") return avx512::table<T>();
  if (isa == "avx2") return avx2::table<T>();
#endif
#ifdef FASTMAML_ARM64
  if (isa == "neon") return neon::table<T>();
#endif
  if (isa == "portable") return portable::table<T>();
  throw std::runtime_error("no kernels were built for the instruction set \"" + isa + "\"");
}

template <typename T>
const Kernels<T>& kernels() {
  static const Kernels<T>& chosen = kernels_for<T>(chosen_isa());
  return chosen;
}

template const Kernels<float>& kernels_for<float>(const std::string&);
template const Kernels<double>& kernels_for<double>(const std::string&);
template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();

}  // namespace fastmaml
