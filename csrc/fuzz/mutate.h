// Mutants that pass the outer checks, so that the inner decoders meet them.
#pragma once

#include "anatomy.h"
#include "numbers.h"

namespace rle::fuzz {

class Random {
 public:
  explicit Random(u64 seed) : state_(seed) {}
  u64 next() { return mix(state_ += CounterRng::kStep); }
  u64 below(u64 limit) { return limit > 0 ? next() % limit : 0; }
  bool one_in(u64 times) { return below(times) == 0; }

 private:
  u64 state_;
};

// Changes one to four parts of the input and repairs most of the numbers that follow.
Bytes mutated(const u8* bytes, u64 size, Random& random);

// Tensors of both inputs, in the first one's manifest.
Bytes crossed(const u8* left, u64 left_size, const u8* right, u64 right_size, Random& random);

}  // namespace rle::fuzz
