// Bit streams (LSB first) and the 64-bit masks that say which elements are set.
#pragma once

#include "isa.h"

namespace rle {
namespace {

inline int popcount(u64 word) {
#if RLE_LEVEL > 0 || defined(__POPCNT__) || defined(__aarch64__)
  return __builtin_popcountll(word);
#else
  // Plain x86-64 has no instruction for it, and the compiler's routine is a slow call.
  word -= word >> 1 & 0x5555555555555555ull;
  word = (word & 0x3333333333333333ull) + (word >> 2 & 0x3333333333333333ull);
  word = (word + (word >> 4)) & 0x0F0F0F0F0F0F0F0Full;
  return static_cast<int>(word * 0x0101010101010101ull >> 56);
#endif
}
inline int lowest(u64 word) { return __builtin_ctzll(word); }
inline int highest(u64 word) { return 63 - __builtin_clzll(word); }

inline u64 low_bits(unsigned count) {
  return count >= 64 ? ~u64{0} : (u64{1} << count) - 1;
}

inline u32 mask_words(u32 elements) { return (elements + 63) / 64; }

inline u32 count_bits(const u64* words, u32 count) {
  u32 bits = 0;
  for (u32 w = 0; w < count; ++w) bits += static_cast<u32>(popcount(words[w]));
  return bits;
}

inline void set_range(u64* words, u32 begin, u32 end) {
  while (begin < end) {
    const u32 stop = (begin | 63) + 1 < end ? (begin | 63) + 1 : end;
    words[begin >> 6] |= low_bits(stop - begin) << (begin & 63);
    begin = stop;
  }
}

// Writes codes of up to 56 bits; every put stores 8 bytes, so leave 8 bytes of slack.
class BitWriter {
 public:
  explicit BitWriter(u8* at) : at_(at) {}

  void put(u64 value, unsigned bits) {
    pending_ |= value << used_;
    used_ += bits;
    store(at_, pending_);
    at_ += used_ >> 3;
    pending_ >>= used_ & ~7u;
    used_ &= 7;
  }

  // Rice code: value >> k zeros, a one, then the k low bits.
  void rice(u32 value, unsigned k) {
    u32 zeros = value >> k;
    for (; zeros > 32; zeros -= 32) put(0, 32);
    put((u64{1} | (value & low_bits(k)) << 1) << zeros, zeros + 1 + k);
  }

 private:
  u8* at_;
  u64 pending_ = 0;
  unsigned used_ = 0;
};

// Reads Rice codes from a copy of an index stream that has kIndexSlack zero bytes behind it.
// The first fault ends the reading: later calls return zeros.
class BitReader {
 public:
  BitReader(const u8* bytes, u32 length) : bytes_(bytes), end_(u64{8} * length) {}

  const Fault& fault() const { return fault_; }
  bool failed() const { return fault_.reason != nullptr; }

  u32 rice(unsigned k, u32 largest_quotient) {
    if (failed()) return 0;
    u64 quotient = 0;
    u64 window = peek();
    while ((window & low_bits(56)) == 0) {
      const u64 zeros = end_ - at_ < 56 ? end_ - at_ : 56;
      quotient += zeros;
      at_ += zeros;
      if (quotient > largest_quotient) return fail({"unary", quotient, largest_quotient});
      if (at_ == end_) return fail({"index_overrun"});
      window = peek();
    }
    // Only zeros stand behind the stream, so this one lies inside it.
    const unsigned zeros = static_cast<unsigned>(lowest(window));
    quotient += zeros;
    at_ += zeros + 1;
    if (quotient > largest_quotient) return fail({"unary", quotient, largest_quotient});
    const u32 value = static_cast<u32>(quotient << k | (peek() & low_bits(k)));
    at_ += k;
    if (at_ > end_) return fail({"index_overrun"});
    return value;
  }

  // Reads kCodes codes without moving on. Returns the bits they take, or 0 if they do not
  // lie in one window of the stream and inside it.
  template <int kCodes>
  unsigned peek_group(unsigned k, u32* values) const {
    const u64 mask = low_bits(k);
    // Signed, so that shifts fill up with ones and there is always a lowest one.
    auto window = static_cast<std::int64_t>(peek() | u64{1} << 63);
    unsigned used = kCodes * (k + 1);
    for (int i = 0; i < kCodes; ++i) {
      const unsigned zeros = static_cast<unsigned>(lowest(static_cast<u64>(window)));
      window >>= zeros;
      values[i] = static_cast<u32>(zeros << k | (static_cast<u64>(window >> 1) & mask));
      window >>= k + 1;
      used += zeros;
    }
    return used <= kWindow && at_ + used <= end_ ? used : 0;
  }

  void skip(unsigned bits) { at_ += bits; }

  // True if only padding is left: fewer than 8 bits, all zero.
  bool exhausted() const { return end_ - at_ < 8 && (peek() & low_bits(end_ - at_)) == 0; }

  // The stream must end in the byte of its last code, and its spare bits must be zero.
  Fault finish() const {
    if (failed()) return fault_;
    if (end_ - at_ >= 8) return {"index_unused", (end_ - at_) / 8};
    if (!exhausted()) return {"index_padding"};
    return {};
  }

  u32 fail(const Fault& fault) {
    fault_ = fault;
    return 0;
  }

 private:
  static constexpr unsigned kWindow = 56;

  u64 peek() const { return load<u64>(bytes_ + (at_ >> 3)) >> (at_ & 7); }

  const u8* bytes_;
  u64 at_ = 0;
  u64 end_;
  Fault fault_{};  // braces: a constructor would be shared between instruction sets
};

}  // namespace
}  // namespace rle
