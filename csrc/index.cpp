#include "index.h"

#include <algorithm>

namespace rle {

namespace {

// A coded stream must beat the bitmap by this share, since bitmaps decode faster.
constexpr u32 kBitmapAdvantage = 64;

u64 inverted(const u64* masks, u32 elements, u32 word) {
  const u32 left = elements - word * 64;
  return ~masks[word] & low_bits(std::min<u32>(left, 64));
}

u64 shifted_sum(const std::vector<u16>& symbols, unsigned k) {
  u32 sum = 0;  // at most 2^16 elements in all gaps of one block
  for (const u16 s : symbols) sum += static_cast<u32>(s >> k);
  return sum;
}

u32 toggles(const u64* masks, u32 words) {
  u32 count = 0;
  u64 carry = 0;
  for (u32 w = 0; w < words; ++w) {
    count += popcount(masks[w] & ~(masks[w] << 1 | carry));
    carry = masks[w] >> 63;
  }
  return count;
}

template <class WordAt>
u32 last_position(u32 words, WordAt word_at) {
  for (u32 w = words; w-- > 0;)
    if (const u64 m = word_at(w)) return w * 64 + 63 - __builtin_clzll(m);
  return 0;
}

}  // namespace

void IndexEncoder::collect_gaps(const u64* masks, u32 elements, bool invert) {
  first_.clear();
  u32 next = 0;
  const auto push = [&](u32 position) {
    first_.push_back(static_cast<u16>(position - next));
    next = position + 1;
  };
  const u32 words = mask_words(elements);
  if (!invert) return for_each_set(masks, words, push);
  for (u32 w = 0; w < words; ++w)
    for (u64 m = inverted(masks, elements, w); m != 0; m &= m - 1) push(w * 64 + lowest(m));
}

void IndexEncoder::collect_spans(const u64* masks, u32 elements) {
  first_.clear();
  second_.clear();
  u32 last = 0;
  bool inside = false;
  u64 carry = 0;
  for (u32 w = 0; w < mask_words(elements); ++w) {
    for (u64 m = masks[w] ^ (masks[w] << 1 | carry); m != 0; m &= m - 1) {
      const u32 position = w * 64 + lowest(m);
      if (position >= elements) break;
      const u32 length = position - last;
      if (inside)
        second_.push_back(static_cast<u16>(length - 1));
      else
        first_.push_back(static_cast<u16>(first_.empty() ? length : length - 1));
      inside = !inside;
      last = position;
    }
    carry = masks[w] >> 63;
  }
  // The span that was closed last is implied when only zeros follow it.
  if (!inside) second_.pop_back();
}

IndexEncoder::Rice IndexEncoder::best_rice(const std::vector<u16>& symbols) {
  const u64 count = symbols.size();
  if (count == 0) return {0, 0};
  const auto cost = [&](unsigned k) { return count * (k + 1) + shifted_sum(symbols, k); };
  // Start near log2(mean) and walk downhill; the cost has one valley in k.
  const u64 mean = shifted_sum(symbols, 0) / count;
  unsigned k = mean < 2 ? 0 : 63 - __builtin_clzll(mean);
  u64 best = cost(k);
  for (const int step : {-1, 1}) {
    bool improved = false;
    for (int next = int(k) + step; next >= 0 && next <= 15; next += step) {
      const u64 bits = cost(next);
      if (bits >= best) break;
      best = bits;
      k = next;
      improved = true;
    }
    if (improved) break;
  }
  return {k, best};
}

// No Rice parameter codes `symbols` numbers that sum to `total` in fewer bits.
u64 IndexEncoder::rice_floor(u64 symbols, u64 total) {
  u64 best = ~u64{0};
  for (unsigned k = 0; k < 16; ++k) {
    const u64 remainders = symbols * ((u64{1} << k) - 1);
    const u64 unary = total > remainders ? (total - remainders) >> k : 0;
    best = std::min(best, symbols * (k + 1) + unary);
  }
  return best;
}

// What coded spans cost at least. Gaps greater than zero are the spans of the other kind,
// so collected gaps give the exact cost of one half.
u64 IndexEncoder::spans_floor(const u64* masks, u32 elements, u32 set, u32 last_set,
                              bool gaps_of_clear, bool gaps_collected) const {
  const u64 spans = toggles(masks, mask_words(elements));
  u32 last_begin = last_set;
  while (last_begin > 0 && masks[(last_begin - 1) >> 6] >> ((last_begin - 1) & 63) & 1)
    --last_begin;
  const u32 implied = last_set + 1 - last_begin;
  const u64 zeros = last_set + 1 - set;
  const u64 zeros_floor = rice_floor(spans, zeros - std::min(zeros, spans - 1));
  const u64 ones_floor = rice_floor(spans - 1, set - implied - (spans - 1));
  if (!gaps_collected) return zeros_floor + ones_floor;

  const bool implied_is_gap = gaps_of_clear && last_set + 1 < elements;
  const u64 coded = gaps_of_clear ? spans - 1 : spans;
  u64 exact = ~u64{0};
  for (unsigned k = 0; k < 16; ++k) {
    if (coded * (k + 1) >= exact) break;
    u32 sum = 0;
    for (const u16 gap : first_) sum += static_cast<u32>((gap - (gap != 0)) >> k);
    if (implied_is_gap) sum -= (implied - 1) >> k;
    exact = std::min(exact, coded * (k + 1) + sum);
  }
  return exact + (gaps_of_clear ? zeros_floor : ones_floor);
}

BlockIndex IndexEncoder::encode(const u64* masks, u32 elements, u64 value_cost,
                                std::vector<u8>& out) {
  const u32 words = mask_words(elements);
  u32 set = 0;
  for (u32 w = 0; w < words; ++w) set += popcount(masks[w]);
  if (set == elements) return {Mode::dense, 0, 0, elements, elements, 0};

  const u32 clear = elements - set;
  const u32 bitmap_bytes = (elements + 7) / 8;
  BlockIndex best{Mode::bitmap, 0, 0, elements, set, bitmap_bytes};
  u64 limit = bitmap_bytes - bitmap_bytes / kBitmapAdvantage;
  const auto consider = [&](Mode mode, unsigned k0, unsigned k1, u64 bits) {
    const u64 bytes = (bits + 7) / 8;
    if (bytes >= limit) return;
    limit = bytes;
    best.mode = mode;
    best.k0 = static_cast<u8>(k0);
    best.k1 = static_cast<u8>(k1);
    best.index_bytes = static_cast<u32>(bytes);
  };

  // Gaps of the commoner kind cost at least 2 bits each when k > 0, a bitmap or more; at
  // k = 0 they cost exactly the position of the last one, so they need no extraction.
  const bool clear_is_rarer = clear < set;
  const u32 last_set = last_position(words, [&](u32 w) { return masks[w]; });
  const u32 last_clear =
      last_position(words, [&](u32 w) { return inverted(masks, elements, w); });
  consider(clear_is_rarer ? Mode::gaps : Mode::clear_gaps, 0, 0,
           u64{clear_is_rarer ? last_set : last_clear} + 1);
  const u32 rarer = clear_is_rarer ? clear : set;
  const u32 rarer_last = clear_is_rarer ? last_clear : last_set;
  bool gaps_collected = false;
  if (rice_floor(rarer, rarer_last + 1 - rarer) < 8 * limit) {
    collect_gaps(masks, elements, clear_is_rarer);
    gaps_collected = true;
    const Rice rice = best_rice(first_);
    consider(clear_is_rarer ? Mode::clear_gaps : Mode::gaps, rice.k, 0, rice.bits);
  }
  const u64 floor =
      spans_floor(masks, elements, set, last_set, clear_is_rarer, gaps_collected);
  if (floor < 8 * limit) {
    collect_spans(masks, elements);
    gaps_collected = false;
    const Rice zeros = best_rice(first_);
    const Rice ones = best_rice(second_);
    consider(Mode::spans, zeros.k, ones.k, zeros.bits + ones.bits);
  }

  const u64 coded_cost = set * value_cost + u64{best.index_bytes} * 8 * 4096;
  if (coded_cost >= elements * value_cost) return {Mode::dense, 0, 0, elements, elements, 0};

  const std::size_t at = out.size();
  out.resize(at + best.index_bytes + 8);
  if (best.mode == Mode::bitmap) {
    std::memcpy(out.data() + at, masks, bitmap_bytes);
  } else if (best.mode == Mode::spans) {
    BitWriter writer(out.data() + at);
    for (std::size_t i = 0; i < first_.size(); ++i) {
      writer.rice(first_[i], best.k0);
      if (i < second_.size()) writer.rice(second_[i], best.k1);
    }
  } else {
    const bool invert = best.mode == Mode::clear_gaps;
    if (!gaps_collected || invert != clear_is_rarer) collect_gaps(masks, elements, invert);
    BitWriter writer(out.data() + at);
    for (const u16 gap : first_) writer.rice(gap, best.k0);
  }
  out.resize(at + best.index_bytes);
  return best;
}

namespace {

[[noreturn]] void out_of_block(u64 position, u32 elements) {
  throw Refused("index_range", "an index stream reaches element " + std::to_string(position) +
                                   " of a block that has " + std::to_string(elements));
}

void decode_bitmap(const BlockIndex& block, const u8* stream, u64* masks) {
  std::memcpy(masks, stream, block.index_bytes);
  const u32 words = mask_words(block.elements);
  const unsigned tail = block.elements & 63;
  if (tail != 0 && (masks[words - 1] & ~low_bits(tail)) != 0)
    throw Refused("index_padding", "the spare bits behind a bitmap are not zero");
  u32 set = 0;
  for (u32 w = 0; w < words; ++w) set += popcount(masks[w]);
  if (set != block.stored)
    throw Refused("bitmap_count", "a bitmap has " + std::to_string(set) +
                                      " set bits, its descriptor says " +
                                      std::to_string(block.stored));
}

void decode_gaps(const BlockIndex& block, u32 count, BitReader& reader, u64* masks) {
  const u32 largest = block.elements >> block.k0;
  u64 next = 0;
  for (u32 i = 0; i < count; ++i) {
    const u64 position = next + reader.rice(block.k0, largest);
    if (position >= block.elements) out_of_block(position, block.elements);
    masks[position >> 6] |= u64{1} << (position & 63);
    next = position + 1;
  }
  reader.finish();
}

void invert(u64* masks, u32 elements) {
  for (u32 w = 0; w < mask_words(elements); ++w) masks[w] = inverted(masks, elements, w);
}

void decode_spans(const BlockIndex& block, BitReader& reader, u64* masks) {
  u64 position = 0;
  u32 left = block.stored;
  while (left > 0) {
    const bool first = left == block.stored;
    position += reader.rice(block.k0, block.elements >> block.k0) + (first ? 0 : 1);
    u32 length = left;
    if (!reader.exhausted()) {
      length = reader.rice(block.k1, block.elements >> block.k1) + 1;
      if (length >= left)
        throw Refused("span_length", "a coded span has " + std::to_string(length) +
                                         " elements where fewer than " + std::to_string(left) +
                                         " are left; the last span is implied");
    }
    if (position + length > block.elements) out_of_block(position + length, block.elements);
    set_range(masks, static_cast<u32>(position), static_cast<u32>(position + length));
    position += length;
    left -= length;
  }
  reader.finish();
}

}  // namespace

void decode_index(const BlockIndex& block, const u8* stream, u64* masks) {
  if (block.mode == Mode::bitmap) return decode_bitmap(block, stream, masks);
  u8 copy[kMaxBlock / 8 + BitReader::kSlack];
  std::memcpy(copy, stream, block.index_bytes);
  std::memset(copy + block.index_bytes, 0, BitReader::kSlack);
  BitReader reader(copy, block.index_bytes);
  if (block.mode == Mode::spans) return decode_spans(block, reader, masks);
  if (block.mode == Mode::gaps) return decode_gaps(block, block.stored, reader, masks);
  decode_gaps(block, block.elements - block.stored, reader, masks);
  invert(masks, block.elements);
}

}  // namespace rle
