// The index plane of one block: masks of set elements <-> a mode and its bit stream.
#pragma once

#include "lanes.h"

namespace rle {
namespace {

// A coded stream must beat the bitmap by this share, since bitmaps decode faster.
constexpr u32 kBitmapAdvantage = 64;
// Spans are measured before gaps if the rarer elements are this many times as many.
constexpr u32 kFewSpans = 8;

// --- choosing and writing ---

u64 shifted_sum(const u16* symbols, u32 count, unsigned k) {
  u32 sum = 0;  // at most 2^16 elements in all gaps of one block
  for (u32 i = 0; i < count; ++i) sum += static_cast<u32>(symbols[i] >> k);
  return sum;
}

// Spans of set elements.
u32 count_spans(const u64* masks, u32 words) {
  u64 count = static_cast<u64>(popcount(masks[0] & ~(masks[0] << 1)));
  for (u32 w = 1; w < words; ++w)
    count += static_cast<u64>(popcount(masks[w] & ~(masks[w] << 1 | masks[w - 1] >> 63)));
  return static_cast<u32>(count);
}

// The last element that is set, or with `flip` ~0 the last that is clear; 0 if none is.
u32 last_place(const u64* masks, u32 elements, u64 flip) {
  const u32 words = mask_words(elements);
  for (u32 w = words; w-- > 0;) {
    const u64 m = (masks[w] ^ flip) & low_bits(elements - w * 64);
    if (m != 0) return w * 64 + static_cast<u32>(highest(m));
  }
  return 0;
}

void invert(const u64* masks, u32 elements, u64* out) {
  const u32 words = mask_words(elements);
  for (u32 w = 0; w < words; ++w) out[w] = ~masks[w];
  if (elements & 63) out[words - 1] &= low_bits(elements & 63);
}

// To scratch.gaps: the clear elements before each set one, or the set ones before each
// clear one.
u32 collect_gaps(Scratch& scratch, u32 elements, bool of_clear) {
  const u64* masks = scratch.masks;
  if (of_clear) {
    invert(masks, elements, scratch.other_masks);
    masks = scratch.other_masks;
  }
  const u16* places = scratch.positions;
  const u32 count = places_of(masks, mask_words(elements), scratch.positions);
  scratch.gaps[0] = places[0];
  for (u32 i = 1; i < count; ++i)
    scratch.gaps[i] = static_cast<u16>(places[i] - places[i - 1] - 1);
  return count;
}

struct Spans {
  u32 zeros;  // coded zero-spans in scratch.zero_spans
  u32 ones;   // coded set spans in scratch.spans: all but the last
};

Spans collect_spans(Scratch& scratch, u32 elements) {
  const u32 words = mask_words(elements);
  const u64* masks = scratch.masks;
  scratch.other_masks[0] = masks[0] ^ masks[0] << 1;
  for (u32 w = 1; w < words; ++w)
    scratch.other_masks[w] = masks[w] ^ (masks[w] << 1 | masks[w - 1] >> 63);
  if (elements & 63) scratch.other_masks[words - 1] &= low_bits(elements & 63);
  const u16* edge = scratch.positions;
  const u32 edges = places_of(scratch.other_masks, words, scratch.positions);
  const u32 zeros = (edges + 1) / 2;
  const u32 ones = (edges - 1) / 2;
  scratch.zero_spans[0] = edge[0];
  for (u32 i = 1; i < zeros; ++i)
    scratch.zero_spans[i] = static_cast<u16>(edge[2 * i] - edge[2 * i - 1] - 1);
  for (u32 i = 0; i < ones; ++i)
    scratch.spans[i] = static_cast<u16>(edge[2 * i + 1] - edge[2 * i] - 1);
  return {zeros, ones};
}

struct Rice {
  unsigned k;
  u64 bits;
};

Rice best_rice(const u16* symbols, u32 count) {
  if (count == 0) return {0, 0};
  const auto cost = [&](unsigned k) {
    return u64{count} * (k + 1) + shifted_sum(symbols, count, k);
  };
  // Start near log2(mean) and walk downhill; the cost has one valley in k.
  const u64 mean = shifted_sum(symbols, count, 0) / count;
  unsigned k = mean < 2 ? 0 : static_cast<unsigned>(highest(mean));
  u64 best = cost(k);
  for (int step = -1; step <= 1; step += 2) {
    bool improved = false;
    for (int next = int(k) + step; next >= 0 && next <= 15; next += step) {
      const u64 bits = cost(static_cast<unsigned>(next));
      if (bits >= best) break;
      best = bits;
      k = static_cast<unsigned>(next);
      improved = true;
    }
    if (improved) break;
  }
  return {k, best};
}

// No Rice parameter codes `symbols` numbers that sum to `total` in fewer bits.
u64 rice_floor(u64 symbols, u64 total) {
  u64 best = ~u64{0};
  for (unsigned k = 0; k < 16; ++k) {
    const u64 remainders = symbols * ((u64{1} << k) - 1);
    const u64 unary = total > remainders ? (total - remainders) >> k : 0;
    best = smaller_of(best, symbols * (k + 1) + unary);
  }
  return best;
}

// What coded spans cost at least, or anything from `enough` up. Gaps greater than zero are
// the spans of the other kind, so `gap_count` collected gaps give the exact cost of one half.
u64 spans_floor(const Scratch& scratch, u32 elements, u32 set, u32 last_set, u32 spans,
                bool gaps_of_clear, u32 gap_count, u64 enough) {
  const u64* masks = scratch.masks;
  u32 last_begin = last_set;
  while (last_begin > 0 && masks[(last_begin - 1) >> 6] >> ((last_begin - 1) & 63) & 1)
    --last_begin;
  const u32 implied = last_set + 1 - last_begin;
  const u64 zeros = last_set + 1 - set;
  const u64 zeros_floor = rice_floor(spans, zeros - smaller_of(zeros, spans - 1));
  const u64 ones_floor = rice_floor(spans - 1, set - implied - (spans - 1));
  if (gap_count == 0 || zeros_floor + ones_floor >= enough) return zeros_floor + ones_floor;

  const bool implied_is_gap = gaps_of_clear && last_set + 1 < elements;
  const u64 coded = gaps_of_clear ? spans - 1 : spans;
  u64 exact = ~u64{0};
  for (unsigned k = 0; k < 16; ++k) {
    if (coded * (k + 1) >= exact) break;
    u32 sum = 0;
    for (u32 i = 0; i < gap_count; ++i) {
      const u16 gap = scratch.gaps[i];
      sum += static_cast<u32>(static_cast<u16>(gap - (gap != 0)) >> k);
    }
    if (implied_is_gap) sum -= (implied - 1) >> k;
    exact = smaller_of(exact, coded * (k + 1) + sum);
  }
  return exact + (gaps_of_clear ? zeros_floor : ones_floor);
}

BlockIndex encode_index(Scratch& scratch, u32 elements, u32 set, u64 value_cost) {
  const u64* masks = scratch.masks;
  const u32 words = mask_words(elements);
  const BlockIndex dense{Mode::dense, 0, 0, elements, elements, 0};
  if (set == elements) return dense;

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

  // Of equal costs the first one considered wins. Gaps of the commoner kind cost at least
  // 2 bits each when k > 0, a bitmap or more; at k = 0 they cost exactly the position of
  // the last one, so they need no extraction.
  const bool clear_is_rarer = clear < set;
  const u32 last_set = last_place(masks, elements, 0);
  const u32 last_clear = last_place(masks, elements, ~u64{0});
  consider(clear_is_rarer ? Mode::gaps : Mode::clear_gaps, 0, 0,
           u64{clear_is_rarer ? last_set : last_clear} + 1);

  // Where spans are few they cost little to collect, and then gaps seldom need to be.
  const u32 rarer = clear_is_rarer ? clear : set;
  const u32 span_count = count_spans(masks, words);
  const bool few_spans = span_count < rarer / kFewSpans;
  Spans spans{};
  Rice zeros{};
  Rice ones{};
  const auto measure_spans = [&] {
    spans = collect_spans(scratch, elements);
    zeros = best_rice(scratch.zero_spans, spans.zeros);
    ones = best_rice(scratch.spans, spans.ones);
  };
  u64 gaps_limit = 8 * limit;
  if (few_spans) {
    measure_spans();
    gaps_limit = smaller_of(gaps_limit, (zeros.bits + ones.bits + 7) / 8 * 8 + 1);
  }

  const u32 rarer_last = clear_is_rarer ? last_clear : last_set;
  u32 gap_count = 0;
  if (rice_floor(rarer, rarer_last + 1 - rarer) < gaps_limit) {
    gap_count = collect_gaps(scratch, elements, clear_is_rarer);
    const Rice rice = best_rice(scratch.gaps, gap_count);
    consider(clear_is_rarer ? Mode::clear_gaps : Mode::gaps, rice.k, 0, rice.bits);
  }
  if (!few_spans && spans_floor(scratch, elements, set, last_set, span_count,
                                clear_is_rarer, gap_count, 8 * limit) < 8 * limit)
    measure_spans();
  if (spans.zeros > 0) consider(Mode::spans, zeros.k, ones.k, zeros.bits + ones.bits);

  const u64 coded_cost = set * value_cost + u64{best.index_bytes} * 8 * 4096;
  if (coded_cost >= elements * value_cost) return dense;

  if (best.mode == Mode::bitmap) {
    std::memcpy(scratch.index, masks, bitmap_bytes);
    return best;
  }
  BitWriter writer(scratch.index);
  if (best.mode == Mode::spans) {
    for (u32 i = 0; i < spans.zeros; ++i) {
      writer.rice(scratch.zero_spans[i], best.k0);
      if (i < spans.ones) writer.rice(scratch.spans[i], best.k1);
    }
    return best;
  }
  const bool of_clear = best.mode == Mode::clear_gaps;
  if (gap_count == 0 || of_clear != clear_is_rarer)
    gap_count = collect_gaps(scratch, elements, of_clear);
  for (u32 i = 0; i < gap_count; ++i) writer.rice(scratch.gaps[i], best.k0);
  return best;
}

// --- reading ---

Fault decode_bitmap(const BlockIndex& block, const u8* stream, u64* masks) {
  const u32 words = mask_words(block.elements);
  masks[words - 1] = 0;
  std::memcpy(masks, stream, block.index_bytes);
  const unsigned tail = block.elements & 63;
  if (tail != 0 && (masks[words - 1] & ~low_bits(tail)) != 0) return {"index_padding"};
  const u32 set = count_bits(masks, words);
  if (set != block.stored) return {"bitmap_count", set, block.stored};
  return {};
}

// Collects rising places into masks, a word at a time.
class MaskWriter {
 public:
  explicit MaskWriter(u64* masks) : masks_(masks) {}

  void set(u32 place) {
    const u32 word = place >> 6;
    bits_ = (word == word_ ? bits_ : 0) | u64{1} << (place & 63);
    word_ = word;
    masks_[word] = bits_;
  }

 private:
  u64* masks_;
  u32 word_ = 0;
  u64 bits_ = 0;
};

// Collects rising places as they are.
class PlaceWriter {
 public:
  explicit PlaceWriter(u16* places) : at_(places) {}
  void set(u32 place) { *at_++ = static_cast<u16>(place); }

 private:
  u16* at_;
};

// Sets what can be had in whole groups; anything malformed is left to the slow reader.
template <int kCodes, class Writer>
void decode_gap_groups(const BlockIndex& block, u32 count, BitReader& reader, Writer& out,
                       u32& done, u64& next) {
  u32 gaps[kCodes];
  while (done + kCodes <= count) {
    const unsigned used = reader.peek_group<kCodes>(block.k0, gaps);
    if (used == 0) return;
    u64 places[kCodes];
    u64 place = next;
    for (int i = 0; i < kCodes; ++i) {
      places[i] = place + gaps[i];
      place = places[i] + 1;
    }
    if (place > block.elements) return;
    for (int i = 0; i < kCodes; ++i) out.set(static_cast<u32>(places[i]));
    reader.skip(used);
    next = place;
    done += kCodes;
  }
}

template <class Writer>
Fault decode_gaps(const BlockIndex& block, u32 count, BitReader& reader, Writer out) {
  const u32 largest = block.elements >> block.k0;
  u64 next = 0;
  u32 done = 0;
  while (done < count && !reader.failed()) {
    if (block.k0 <= 3)
      decode_gap_groups<8>(block, count, reader, out, done, next);
    else
      decode_gap_groups<4>(block, count, reader, out, done, next);
    // A group that does not fit one window, the last codes, and whatever is malformed.
    for (u32 i = 0; i < 4 && done < count && !reader.failed(); ++i) {
      const u64 place = next + reader.rice(block.k0, largest);
      if (reader.failed()) break;
      if (place >= block.elements) return {"index_range", place, block.elements};
      out.set(static_cast<u32>(place));
      next = place + 1;
      ++done;
    }
  }
  return reader.finish();
}

Fault decode_spans(const BlockIndex& block, BitReader& reader, u64* masks) {
  u64 place = 0;
  u32 left = block.stored;
  while (left > 0) {
    const bool first = left == block.stored;
    place += reader.rice(block.k0, block.elements >> block.k0) + (first ? 0 : 1);
    u32 length = left;
    if (!reader.failed() && !reader.exhausted()) {
      length = reader.rice(block.k1, block.elements >> block.k1) + 1;
      if (!reader.failed() && length >= left) return {"span_length", length, left};
    }
    if (reader.failed()) return reader.fault();
    if (place + length > block.elements)
      return {"index_range", place + length, block.elements};
    set_range(masks, static_cast<u32>(place), static_cast<u32>(place + length));
    place += length;
    left -= length;
  }
  return reader.finish();
}

// A copy of a stream with the zeros that a BitReader needs behind it.
struct PaddedStream {
  PaddedStream(const u8* stream, u32 length) {
    std::memcpy(bytes, stream, length);
    std::memset(bytes + length, 0, kIndexSlack);
  }
  u8 bytes[kMaxIndexBytes + kIndexSlack];
};

Fault decode_index(const BlockIndex& block, const u8* stream, u64* masks) {
  if (block.mode == Mode::bitmap) return decode_bitmap(block, stream, masks);
  const PaddedStream padded(stream, block.index_bytes);
  std::memset(masks, 0, sizeof(u64) * mask_words(block.elements));
  BitReader reader(padded.bytes, block.index_bytes);
  if (block.mode == Mode::spans) return decode_spans(block, reader, masks);
  const bool of_clear = block.mode == Mode::clear_gaps;
  const u32 count = of_clear ? block.elements - block.stored : block.stored;
  const Fault fault = decode_gaps(block, count, reader, MaskWriter(masks));
  if (of_clear && fault.reason == nullptr) invert(masks, block.elements, masks);
  return fault;
}

// The places of a block in Rice gaps.
Fault decode_places(const BlockIndex& block, const u8* stream, u16* places) {
  const PaddedStream padded(stream, block.index_bytes);
  BitReader reader(padded.bytes, block.index_bytes);
  return decode_gaps(block, block.stored, reader, PlaceWriter(places));
}

}  // namespace
}  // namespace rle
