// The entry points of libFuzzer; main.cpp calls the same ones where there is none.
#include "target.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>

#include "mutate.h"
#include "properties.h"

using rle::fuzz::Bytes;
using rle::fuzz::Random;
using rle::fuzz::Tally;

namespace {

std::size_t copy_out(const Bytes& from, rle::u8* to, std::size_t most) {
  const std::size_t size = std::min(from.size(), most);
  std::copy_n(from.data(), size, to);
  return size;
}

}  // namespace

namespace rle::fuzz {

Tally& tally() {
  // Never destroyed: the report is written while the process ends.
  static Tally* const all = new Tally;
  return *all;
}

void report() {
  const Tally& all = tally();
  const auto line = [&](u64 count, const char* verdict) {
    const double share = 100.0 * static_cast<double>(count) /
                         static_cast<double>(std::max<u64>(all.executions, 1));
    std::fprintf(stderr, "%12" PRIu64 " %6.2f %%  %s\n", count, share, verdict);
  };
  std::fprintf(stderr, "executions %" PRIu64 "\n", all.executions);
  line(all.accepted, "accepted");
  for (const auto& [reason, count] : all.refused) line(count, reason.c_str());
  std::fprintf(stderr, "digest %016" PRIx64 "\n", all.digest);
}

}  // namespace rle::fuzz

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  std::atexit(rle::fuzz::report);
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  if (size < rle::fuzz::kControlBytes) return 0;
  const rle::fuzz::Verdict verdict = rle::fuzz::check(rle::fuzz::read_input(bytes, size));
  Tally& all = rle::fuzz::tally();
  all.executions += 1;
  all.digest = rle::mix(all.digest ^ verdict.digest);
  if (verdict.reason == nullptr)
    all.accepted += 1;
  else
    all.refused[verdict.reason] += 1;
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* bytes, std::size_t size,
                                               std::size_t most, unsigned seed) {
  Random random(seed);
  return copy_out(rle::fuzz::mutated(bytes, size, random), bytes, most);
}

extern "C" std::size_t LLVMFuzzerCustomCrossOver(const std::uint8_t* left, std::size_t left_size,
                                                 const std::uint8_t* right,
                                                 std::size_t right_size, std::uint8_t* out,
                                                 std::size_t most, unsigned seed) {
  Random random(seed);
  return copy_out(rle::fuzz::crossed(left, left_size, right, right_size, random), out, most);
}
