// Which edges of the core an execution took, as gcc's -fsanitize-coverage=trace-pc tells.
#pragma once

#include <cstddef>

namespace rle::fuzz {

// Edges taken since the last call that no earlier execution had taken.
std::size_t new_edges();
// All edges taken so far; 0 without instrumentation.
std::size_t known_edges();

}  // namespace rle::fuzz
