// Names, numbers and byte access of frame format v1 (docs/wire_format.md).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#if !defined(__BYTE_ORDER__) || !defined(__ORDER_LITTLE_ENDIAN__)
#error "this compiler does not state its byte order; use gcc or clang"
#endif
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "frames are written in host order, so the host must be little-endian");

namespace rle {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;

constexpr u8 kMagic[4] = {0x93, 0x53, 0x4D, 0x32};
constexpr u8 kMajor = 1;
constexpr u8 kMinor = 0;
constexpr u16 kFlagLossless = 1;
constexpr u16 kFlagErrorFeedback = 2;

constexpr u64 kHeaderBytes = 64;
constexpr u64 kHashedHeaderBytes = 56;
constexpr u64 kEntryBytes = 32;
constexpr u64 kTrailerBytes = 8;
constexpr u64 kDescriptorBytes = 8;
constexpr u64 kValueAlignment = 64;

constexpr int kMinBlockLog2 = 12;
constexpr int kMaxBlockLog2 = 16;
constexpr int kMinQuantLog2 = 5;
constexpr int kMaxQuantLog2 = 12;
constexpr u32 kMaxBlock = 1u << kMaxBlockLog2;
constexpr u32 kMaxQuantBlock = 1u << kMaxQuantLog2;

enum class Dtype : u8 { f32 = 0, f16 = 1, bf16 = 2 };
enum class Codec : u8 { raw = 0, bf16 = 1, f16 = 2, int8 = 3, nf4 = 4, int4 = 5 };
enum class Mode : u8 { absent = 0, dense = 1, bitmap = 2, gaps = 3, clear_gaps = 4, spans = 5 };
constexpr int kModes = 6;

// A frame that must not be used; `reason` is the slug of docs/wire_format.md.
class Refused : public std::runtime_error {
 public:
  Refused(const char* slug, const std::string& message)
      : std::runtime_error(message), reason(slug) {}
  const char* reason;
};

// What follows is private to each translation unit: the codec is compiled once for every
// instruction set, and the linker must not mix the copies.
namespace {

inline u64 smaller_of(u64 a, u64 b) { return a < b ? a : b; }

inline bool is_quantised(Codec codec) {
  return codec == Codec::int8 || codec == Codec::nf4 || codec == Codec::int4;
}

// The largest level of a quantised code, in units of its scale.
inline int quant_levels(Codec codec) {
  return codec == Codec::int8 ? 127 : codec == Codec::int4 ? 7 : 1;
}

inline u64 dtype_bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Bits of one stored value, scales not counted.
inline u64 value_bits(Codec codec, Dtype dtype) {
  switch (codec) {
    case Codec::raw: return 8 * dtype_bytes(dtype);
    case Codec::int8: return 8;
    case Codec::nf4:
    case Codec::int4: return 4;
    default: return 16;
  }
}

// Number of 2^log2 sized pieces that cover `count`; cannot overflow.
inline u64 pieces(u64 count, int log2) {
  return (count >> log2) + ((count & ((u64{1} << log2) - 1)) != 0);
}

// Elements of a tensor's block; the last one may be shorter.
inline u32 block_elements(u64 numel, u64 block, int block_log2) {
  const u64 left = numel - (block << block_log2);
  return static_cast<u32>(left >> block_log2 ? u64{1} << block_log2 : left);
}

inline u64 value_plane_bytes(u64 stored, Codec codec, Dtype dtype) {
  const u64 bits = value_bits(codec, dtype);
  return bits == 4 ? pieces(stored, 1) : stored * (bits / 8);
}

inline u64 scale_plane_bytes(u64 stored, Codec codec, int quant_log2) {
  return is_quantised(codec) ? 4 * pieces(stored, quant_log2) : 0;
}

// 16-bit values anywhere in memory; loops over them can be vectorised, unlike load().
using any_u16 = u16 __attribute__((aligned(1), may_alias));

template <class T>
inline T load(const u8* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

template <class T>
inline void store(u8* at, T value) {
  std::memcpy(at, &value, sizeof value);
}

}  // namespace

}  // namespace rle
