// The index plane of one block: masks of set elements <-> a mode and its bit stream.
#pragma once

#include <vector>

#include "bits.h"

namespace rle {

// What an 8-byte block descriptor says, plus the block's element count.
struct BlockIndex {
  Mode mode;
  u8 k0;
  u8 k1;
  u32 elements;
  u32 stored;  // values in the value plane; equals `elements` in a dense block
  u32 index_bytes;
};

inline u32 mask_words(u32 elements) { return (elements + 63) / 64; }

// Chooses the cheapest mode by exact cost and writes its stream.
class IndexEncoder {
 public:
  // value_cost: cost of one stored value in 1/4096 bit (scales included).
  // Appends the stream to `out`. `masks` has mask_words(elements) words, at least one
  // bit set, none beyond `elements`.
  BlockIndex encode(const u64* masks, u32 elements, u64 value_cost, std::vector<u8>& out);

 private:
  struct Rice {
    unsigned k;
    u64 bits;
  };

  void collect_gaps(const u64* masks, u32 elements, bool invert);
  void collect_spans(const u64* masks, u32 elements);
  static Rice best_rice(const std::vector<u16>& symbols);
  u64 spans_floor(const u64* masks, u32 elements, u32 set, u32 last_set, bool gaps_of_clear,
                  bool gaps_collected) const;
  static u64 rice_floor(u64 symbols, u64 total);

  std::vector<u16> first_;   // gaps, or zero-spans
  std::vector<u16> second_;  // non-zero spans but the last
};

// Decodes one index stream into zeroed masks; throws Refused on any malformation.
void decode_index(const BlockIndex& block, const u8* stream, u64* masks);

}  // namespace rle
