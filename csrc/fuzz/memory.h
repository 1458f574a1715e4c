// Counts what `operator new` hands out while a Meter is alive; one Meter at a time.
#pragma once

#include "format.h"

namespace rle::fuzz {

class Meter {
 public:
  Meter();
  ~Meter();
  Meter(const Meter&) = delete;
  Meter& operator=(const Meter&) = delete;

  // Most bytes that were allocated at one moment since the Meter was made.
  u64 peak() const;
};

}  // namespace rle::fuzz
