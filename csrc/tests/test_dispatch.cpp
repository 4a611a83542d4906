// The choice of an instruction set by the environment.
#include <stdlib.h>

#include <stdexcept>

#include "check.h"

int main() {
  using namespace fastmaml_test;
  // The choice is made once per scalar type, when its table is first asked for.
  setenv("FASTMAML_ISA", "sse9", 1);
  std::string message;
  try {
    fastmaml::kernels<float>();
  } catch (const std::invalid_argument& error) {
    message = error.what();
  }
  check(message.find("sse9") != std::string::npos && message.find("portable") != std::string::npos,
        "an unknown instruction set must be refused by name, with those that run: " + message);

  setenv("FASTMAML_ISA", "portable", 1);
  check(fastmaml::kernels<float>().isa == std::string("portable"), "portable was asked for");
  unsetenv("FASTMAML_ISA");
  check(fastmaml::kernels<double>().isa == fastmaml::runnable_isas().front(),
        "the best instruction set is the default");
  for (const std::string& isa : fastmaml::runnable_isas()) {
    check(fastmaml::kernels_for<float>(isa).isa == isa, "the table of " + isa);
    check(fastmaml::kernels_for<float>(isa).lanes == 2 * fastmaml::kernels_for<double>(isa).lanes,
          "twice as many floats as doubles fit a vector: " + isa);
  }
  return report("dispatch");
}
