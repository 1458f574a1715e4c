// What the target has met since it started; printed when the process ends.
#pragma once

#include <map>
#include <string>

#include "format.h"

namespace rle::fuzz {

struct Tally {
  u64 executions = 0;
  u64 accepted = 0;
  std::map<std::string, u64> refused;
  u64 digest = 0;  // of all verdicts and decoded bits, in order
};

Tally& tally();
void report();

}  // namespace rle::fuzz
