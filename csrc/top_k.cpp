#include "top_k.h"

namespace rle {

namespace {

constexpr u32 kMagnitude = 0x7FFFFFFFu;
constexpr int kHighBits = 15;
constexpr u32 kHighBins = 1u << kHighBits;
constexpr u32 kLowBins = 1u << 16;

// From the highest bin down: the bin that holds the k-th value; k becomes its rank there.
u32 bin_of(const std::vector<u32>& histogram, u32 bins, u64& k) {
  for (u32 bin = bins; bin-- > 0;) {
    const u64 held = histogram[bin];
    if (held >= k) return bin;
    k -= held;
  }
  return 0;
}

}  // namespace

Threshold kth_magnitude(const std::vector<Piece>& pieces, u64 k) {
  constexpr int kTables = 4;  // equal neighbours must not wait for one counter
  std::vector<u32> high(kTables * kHighBins, 0);
  for (const Piece& piece : pieces) {
    u64 i = 0;
    for (; i + kTables <= piece.count; i += kTables)
      for (u64 t = 0; t < kTables; ++t)
        ++high[t * kHighBins + ((piece.bits[i + t] & kMagnitude) >> 16)];
    for (; i < piece.count; ++i) ++high[(piece.bits[i] & kMagnitude) >> 16];
  }
  for (u32 bin = 0; bin < kHighBins; ++bin)
    for (u32 t = 1; t < kTables; ++t) high[bin] += high[t * kHighBins + bin];

  u64 rank = k;
  const u32 top = bin_of(high, kHighBins, rank);
  std::vector<u32> low(kLowBins, 0);
  for (const Piece& piece : pieces)
    for (u64 i = 0; i < piece.count; ++i) {
      const u32 magnitude = piece.bits[i] & kMagnitude;
      if (magnitude >> 16 == top) ++low[magnitude & 0xFFFFu];
    }
  const u32 bottom = bin_of(low, kLowBins, rank);
  return {top << 16 | bottom, rank};
}

void keep_largest(const Piece& piece, u32 threshold_bits, u64& ties, u32* out) {
  for (u64 i = 0; i < piece.count; ++i) {
    const u32 bits = piece.bits[i];
    const u32 magnitude = bits & kMagnitude;
    bool keep = magnitude > threshold_bits;
    if (magnitude == threshold_bits && ties > 0) {
      keep = true;
      --ties;
    }
    out[i] = keep ? bits : 0;
  }
}

}  // namespace rle
