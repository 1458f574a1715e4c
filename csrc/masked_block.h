// Moving values between the elements of a block and the value plane, under masks.
#pragma once

#include "index_block.h"
#include "lanes.h"

namespace rle {
namespace {

u32 masks_of(const void* elements, u64 width, u32 count, u64* masks) {
  const u8* bytes = static_cast<const u8*>(elements);
  const auto mask_at = [&](u32 w) {
    const u8* at = bytes + 64 * width * w;
    return width == 4 ? mask_of_64(reinterpret_cast<const u32*>(at))
                      : mask_of_64(reinterpret_cast<const u16*>(at));
  };
  // Several streams at once keep the memory busier than one.
  constexpr u32 kStreams = 4;
  const u32 full = count / 64;
  const u32 part = full / kStreams;
  for (u32 w = 0; w < part; ++w)
    for (u32 s = 0; s < kStreams; ++s) masks[s * part + w] = mask_at(s * part + w);
  for (u32 w = part * kStreams; w < full; ++w) masks[w] = mask_at(w);
  if (count & 63) {
    alignas(64) u8 tail[256] = {};
    std::memcpy(tail, bytes + 64 * width * full, width * (count & 63));
    masks[full] = width == 4 ? mask_of_64(reinterpret_cast<const u32*>(tail))
                             : mask_of_64(reinterpret_cast<const u16*>(tail));
  }
  return count_bits(masks, mask_words(count));
}

template <class Bits>
u32 gather_as(const Bits* elements, u32 count, Bits* out) {
  Bits* at = out;
  u32 done = 0;
  for (; done + 64 <= count; done += 64) at = gather_64(elements + done, at);
  if (done < count) {
    Bits tail[64] = {};
    std::memcpy(tail, elements + done, sizeof(Bits) * (count - done));
    at = gather_64(tail, at);
  }
  return static_cast<u32>(at - out);
}

u32 gather(const void* elements, u64 width, u32 count, u8* out) {
  return width == 4 ? gather_as(static_cast<const u32*>(elements), count,
                                reinterpret_cast<u32*>(out))
                    : gather_as(static_cast<const u16*>(elements), count,
                                reinterpret_cast<u16*>(out));
}

template <class Bits>
u32 gather_under_as(const u64* masks, const Bits* elements, u32 count, Bits* out) {
  constexpr int kFew = 6;
  Bits* at = out;
  for (u32 w = 0; w < mask_words(count); ++w, elements += 64) {
    u64 m = masks[w];
    if (popcount(m) > kFew && (w + 1) * 64 <= count)
      at = gather_64(elements, at);
    else
      for (; m != 0; m &= m - 1) *at++ = elements[lowest(m)];
  }
  return static_cast<u32>(at - out);
}

u32 gather_under(const u64* masks, const void* elements, u64 width, u32 count, u8* out) {
  return width == 4 ? gather_under_as(masks, static_cast<const u32*>(elements), count,
                                      reinterpret_cast<u32*>(out))
                    : gather_under_as(masks, static_cast<const u16*>(elements), count,
                                      reinterpret_cast<u16*>(out));
}

// Hands out packed values, 64 at most at a time, with readable bytes behind the last one.
template <class Value>
class PackedValues {
 public:
  PackedValues(const Value* values, u32 stored) : at_(values), left_(stored) {}

  const Value* next(u32 count) {
    if (left_ < 64 + kSlack && !copied_) {
      std::memcpy(tail_, at_, sizeof(Value) * left_);
      at_ = tail_;
      copied_ = true;
    }
    const Value* values = at_;
    at_ += count;
    left_ -= count;
    return values;
  }

 private:
  static constexpr u32 kSlack = 64 / sizeof(Value);
  const Value* at_;
  u32 left_;
  bool copied_ = false;
  Value tail_[64 + 3 * kSlack + 64] = {};
};

template <class Bits>
void expand_as(const u64* masks, u32 count, const Bits* values, u32 stored, bool stream,
               Bits* out) {
  PackedValues<Bits> packed(values, stored);
  const u32 full = count / 64;
  // Most words of such blocks are clear, and a guess that one is seldom fails.
  constexpr u32 kVerySparse = 256;
  const bool very_sparse = stored < count / kVerySparse;
  for (u32 w = 0; w < full; ++w, out += 64) {
    if (very_sparse && masks[w] == 0)
      zero_bytes(reinterpret_cast<u8*>(out), 64 * sizeof(Bits), stream);
    else
      expand_64(masks[w], packed.next(static_cast<u32>(popcount(masks[w]))), stream, out);
  }
  if (count & 63) {
    Bits tail[64];
    expand_64(masks[full], packed.next(static_cast<u32>(popcount(masks[full]))), false, tail);
    std::memcpy(out, tail, sizeof(Bits) * (count & 63));
  }
}

void expand(const u64* masks, u32 count, u64 width, const u8* values, u32 stored, bool stream,
            u8* out) {
  if (width == 4)
    expand_as(masks, count, reinterpret_cast<const u32*>(values), stored, stream,
              reinterpret_cast<u32*>(out));
  else
    expand_as(masks, count, reinterpret_cast<const u16*>(values), stored, stream,
              reinterpret_cast<u16*>(out));
}

void add(const u64* masks, u32 count, const float* values, u32 stored, float weight,
         float* out) {
  constexpr int kFew = 6;
  PackedValues<float> packed(values, stored);
  for (u32 w = 0; w < mask_words(count); ++w, out += 64) {
    u64 m = masks[w];
    const int set = popcount(m);
    const float* next = packed.next(static_cast<u32>(set));
    if (set <= kFew || (w + 1) * 64 > count)
      for (; m != 0; m &= m - 1) out[lowest(m)] += weight * *next++;
    else
      add_64(m, next, weight, out);
  }
}

// The same for a sparse block in Rice gaps, straight from its stream, which was checked.
void add_gaps(const BlockIndex& block, const u8* stream, const float* values, float weight,
              Scratch& scratch, float* out) {
  decode_places(block, stream, scratch.positions);
  for (u32 i = 0; i < block.stored; ++i) out[scratch.positions[i]] += weight * values[i];
}

void add_dense(const float* values, u32 count, float weight, float* out) {
  for (u32 i = 0; i < count; ++i) out[i] += weight * values[i];
}

}  // namespace
}  // namespace rle
