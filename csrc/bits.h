// Bit streams (LSB first) and the 64-bit masks that say which elements are set.
#pragma once

#include "format.h"

namespace rle {

inline int popcount(u64 word) {
#if defined(__POPCNT__) || defined(__aarch64__)
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

inline u64 low_bits(unsigned count) {
  return count >= 64 ? ~u64{0} : (u64{1} << count) - 1;
}

// Calls visit(position) for every set bit, in rising order.
template <class Visit>
inline void for_each_set(const u64* words, u32 count, Visit visit) {
  for (u32 w = 0; w < count; ++w)
    for (u64 m = words[w]; m != 0; m &= m - 1) visit(w * 64 + lowest(m));
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
    put(u64{1} << zeros, zeros + 1);
    put(value & low_bits(k), k);
  }

 private:
  u8* at_;
  u64 pending_ = 0;
  unsigned used_ = 0;
};

// Reads Rice codes from a copy of an index stream that has 32 zero bytes behind it.
class BitReader {
 public:
  static constexpr u32 kSlack = 32;

  BitReader(const u8* bytes, u32 length) : bytes_(bytes), end_(u64{8} * length) {}

  u32 rice(unsigned k, u32 largest_quotient) {
    u64 quotient = 0;
    u64 window = peek();
    while ((window & low_bits(56)) == 0) {
      const u64 zeros = end_ - at_ < 56 ? end_ - at_ : 56;
      quotient += zeros;
      at_ += zeros;
      if (quotient > largest_quotient) unary(largest_quotient);
      if (at_ == end_) overrun();
      window = peek();
    }
    // Only zeros stand behind the stream, so this one lies inside it.
    const unsigned zeros = lowest(window);
    quotient += zeros;
    at_ += zeros + 1;
    if (quotient > largest_quotient) unary(largest_quotient);
    const u32 value = static_cast<u32>(quotient << k | (peek() & low_bits(k)));
    at_ += k;
    if (at_ > end_) overrun();
    return value;
  }

  // True if only padding is left: fewer than 8 bits, all zero.
  bool exhausted() const { return end_ - at_ < 8 && (peek() & low_bits(end_ - at_)) == 0; }

  // The stream must end in the byte of its last code, and its spare bits must be zero.
  void finish() const {
    if (end_ - at_ >= 8)
      throw Refused("index_unused", "an index stream has " + std::to_string((end_ - at_) / 8) +
                                        " byte(s) behind its last code, it needs 0");
    if (!exhausted())
      throw Refused("index_padding", "the spare bits behind an index stream are not zero");
  }

 private:
  u64 peek() const { return load<u64>(bytes_ + (at_ >> 3)) >> (at_ & 7); }

  [[noreturn]] static void overrun() {
    throw Refused("index_overrun", "an index stream ends inside a code");
  }
  [[noreturn]] static void unary(u32 largest) {
    throw Refused("unary", "a unary part in an index stream exceeds the block's largest, " +
                               std::to_string(largest));
  }

  const u8* bytes_;
  u64 at_ = 0;
  u64 end_;
};

}  // namespace rle
