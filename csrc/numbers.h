// Conversions between float32, float16 and bfloat16 bits, and the counter-based generator.
#pragma once

#include "format.h"

namespace rle {
namespace {

constexpr u32 kF32Infinity = 0x7F800000u;
constexpr u16 kF16Infinity = 0x7C00u;
constexpr u16 kBf16Infinity = 0x7F80u;

inline u32 bits_of(float value) {
  u32 bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(u32 bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline bool finite_bits(u32 bits) { return (bits & kF32Infinity) != kF32Infinity; }

inline float from_bf16(u16 half) { return float_of(u32{half} << 16); }

inline float from_f16(u16 half) {
  const u32 sign = (half & 0x8000u) << 16;
  const u32 exponent = (half >> 10) & 31u;
  const u32 mantissa = half & 0x3FFu;
  if (exponent == 31) return float_of(sign | kF32Infinity | mantissa << 13);
  if (exponent == 0) return float_of(sign | bits_of(static_cast<float>(mantissa) * 0x1p-24f));
  return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}

// Round to nearest even; NaN stays NaN.
inline u16 to_bf16(float value) {
  const u32 bits = bits_of(value);
  if ((bits & 0x7FFFFFFFu) > kF32Infinity) return static_cast<u16>(bits >> 16 | 0x40u);
  return static_cast<u16>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

// Round to nearest even; 65520 and above become infinite.
inline u16 to_f16(float value) {
  const u32 bits = bits_of(value);
  const u32 sign = bits >> 16 & 0x8000u;
  u32 magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > kF32Infinity) return static_cast<u16>(sign | 0x7E00u);
  if (magnitude >= 0x477FF000u) return static_cast<u16>(sign | kF16Infinity);
  if (magnitude < 0x38800000u) {
    // The unit of float16 subnormals is the last bit of 0.5f, so the FPU does the rounding.
    const float shifted = float_of(magnitude) + 0.5f;
    return static_cast<u16>(sign | (bits_of(shifted) - 0x3F000000u));
  }
  magnitude += 0xC8000FFFu + (magnitude >> 13 & 1u);
  return static_cast<u16>(sign | magnitude >> 13);
}

// Stochastic roundings carry a magnitude up with the probability of its lost fraction;
// a carry never turns a finite value into an infinite one.
inline u16 to_bf16_stochastic(float value, u64 random) {
  const u32 bits = bits_of(value);
  const u32 raised = (bits + static_cast<u32>(random & 0xFFFFu)) >> 16;
  const bool overflows = (raised & kBf16Infinity) == kBf16Infinity;
  return static_cast<u16>(overflows ? bits >> 16 : raised);
}

inline u16 to_f16_stochastic(float value, u64 random) {
  const u32 bits = bits_of(value);
  const u32 sign = bits >> 16 & 0x8000u;
  const u32 exponent = bits >> 23 & 0xFFu;
  const u64 mantissa = (bits & 0x7FFFFFu) | (exponent != 0 ? 0x800000u : 0u);
  const u32 scale = exponent != 0 ? exponent : 1;
  const u32 shift = scale >= 113 ? 13 : 126 - scale;
  if (shift >= 63) return static_cast<u16>(sign);
  const u64 lost = (u64{1} << shift) - 1;
  const u32 base = scale >= 113 ? (scale - 113) << 10 : 0;
  const u64 down = base + (mantissa >> shift);
  const u64 raised = base + ((mantissa + (random & lost)) >> shift);
  const u64 chosen = raised >= kF16Infinity ? down : raised;
  return static_cast<u16>(sign | (chosen >= kF16Infinity ? kF16Infinity : chosen));
}

inline float from_source(u32 bits, Dtype dtype) {
  if (dtype == Dtype::f32) return float_of(bits);
  const u16 half = static_cast<u16>(bits);
  return dtype == Dtype::f16 ? from_f16(half) : from_bf16(half);
}

// What a receiver holds after it stored `value` in the source dtype.
inline float through_source(float value, Dtype dtype) {
  if (dtype == Dtype::f16) return from_f16(to_f16(value));
  if (dtype == Dtype::bf16) return from_bf16(to_bf16(value));
  return value;
}

// The finaliser of SplitMix64.
inline u64 mix(u64 z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

inline u64 rng_key(u64 seed, u64 round, u64 tensor_id) {
  constexpr u64 kStep = 0x9E3779B97F4A7C15ull;
  return mix(mix(mix(seed + kStep) + round + kStep) + tensor_id + kStep);
}

// Stateless: the number of an element depends on nothing but its key and its index.
struct CounterRng {
  static constexpr u64 kStep = 0x9E3779B97F4A7C15ull;

  explicit CounterRng(u64 rng_key) : key(rng_key) {}

  u64 at(u64 element) const { return mix(key + (element + 1) * kStep); }
  double uniform(u64 element) const { return static_cast<double>(at(element) >> 11) * 0x1p-53; }

  u64 key;
};

}  // namespace
}  // namespace rle
