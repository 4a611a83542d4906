// Working memory of one thread, for kernels whose intermediate results outgrow the stack.
#pragma once

#include <cstddef>

namespace fastmaml {

// At least `bytes`, aligned to 64, with any contents; valid until the thread's next call.
void* thread_scratch(std::size_t bytes);

}  // namespace fastmaml
