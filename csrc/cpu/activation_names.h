// Activations by the names that programs use.
#pragma once

#include <map>
#include <optional>
#include <string>

#include "cpu/kernels.h"

namespace fastmaml {

inline std::optional<Activation> activation_named(const std::string& name) {
  static const std::map<std::string, Activation> names = {
      {"relu", Activation::kRelu},
      {"leaky_relu", Activation::kLeakyRelu},
      {"elu", Activation::kElu},
      {"selu", Activation::kSelu},
      {"gelu", Activation::kGelu},
      {"gelu_tanh", Activation::kGeluTanh},
      {"silu", Activation::kSilu},
      {"sigmoid", Activation::kSigmoid},
      {"tanh", Activation::kTanh},
      {"softplus", Activation::kSoftplus},
      {"hardtanh", Activation::kHardtanh},
      {"log_sigmoid", Activation::kLogSigmoid},
      {"hardsigmoid", Activation::kHardsigmoid},
      {"hardswish", Activation::kHardswish},
      {"mish", Activation::kMish},
      {"abs", Activation::kAbs},
      {"square", Activation::kSquare},
      {"cube", Activation::kCube},
      {"reciprocal", Activation::kReciprocal},
      {"sqrt", Activation::kSqrt},
      {"rsqrt", Activation::kRsqrt},
      {"length", Activation::kLength},
      {"log", Activation::kLog},
      {"clamp", Activation::kClamp},
      {"sin", Activation::kSin},
      {"cos", Activation::kCos},
      {"exp", Activation::kExp},
      {"is_positive", Activation::kIsPositive},
      {"is_zero", Activation::kIsZero},
  };
  const auto found = names.find(name);
  if (found == names.end()) return std::nullopt;
  return found->second;
}

}  // namespace fastmaml
