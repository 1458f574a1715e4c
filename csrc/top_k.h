// Exact selection of the largest magnitudes by two passes of a radix histogram.
#pragma once

#include <vector>

#include "format.h"

namespace rle {

struct Piece {
  const u32* bits;  // float32 values
  u64 count;
};

// Values above `bits` (magnitude bits, sign cleared) are among the largest; of those equal
// to it, the first `ties`.
struct Threshold {
  u32 bits;
  u64 ties;
};

// The k-th largest magnitude of all pieces together; 1 <= k <= their total < 2^32. NaN counts
// as larger than infinity. O(total); 1 MB of working memory.
Threshold kth_magnitude(const std::vector<Piece>& pieces, u64 k);

// Copies `piece` to `out` with zeros where the value is not among the largest. `ties` is
// counted down over the pieces.
void keep_largest(const Piece& piece, u32 threshold_bits, u64& ties, u32* out);

}  // namespace rle
