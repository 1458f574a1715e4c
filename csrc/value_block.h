// The value plane: stored values <-> codes and scales.
#pragma once

#include "lanes.h"
#include "numbers.h"

namespace rle {
namespace {

// Absmax below this makes a block of zeros: 1/scale must stay finite.
constexpr float kSmallestAbsmax = 1e-30f;
constexpr u32 kChunk = 1024;

// --- NF4 (Dettmers et al., arXiv 2305.14314), bitsandbytes' codebook ---

constexpr float kNf4[16] = {-1.0f,
                            -0.6961928009986877f,
                            -0.5250730514526367f,
                            -0.39491748809814453f,
                            -0.28444138169288635f,
                            -0.18477343022823334f,
                            -0.09105003625154495f,
                            0.0f,
                            0.07958029955625534f,
                            0.16093020141124725f,
                            0.24611230194568634f,
                            0.33791524171829224f,
                            0.44070982933044434f,
                            0.5626170039176941f,
                            0.7229568362236023f,
                            1.0f};
constexpr u8 kNf4Zero = 7;

// --- source bits <-> float32 ---

#if RLE_LEVEL > 0
// F16C makes NaNs quiet, which would lose bits; the portable form keeps them.
inline bool any_f16_nan(__m128i halves) {
  const __m128i magnitude = _mm_and_si128(halves, _mm_set1_epi16(0x7FFF));
  return _mm_movemask_epi8(_mm_cmpgt_epi16(magnitude, _mm_set1_epi16(kF16Infinity))) != 0;
}
#endif

void widen_f16(const u8* bits, u32 count, float* out) {
  u32 i = 0;
#if RLE_LEVEL > 0
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bits + 2 * i));
    if (any_f16_nan(halves))
      for (u32 j = i; j < i + 8; ++j) out[j] = from_f16(load<u16>(bits + 2 * j));
    else
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(halves));
  }
#endif
  for (; i < count; ++i) out[i] = from_f16(load<u16>(bits + 2 * i));
}

void widen_bf16(const u8* bits, u32 count, float* out) {
  const any_u16* halves = reinterpret_cast<const any_u16*>(bits);
  for (u32 i = 0; i < count; ++i) out[i] = from_bf16(halves[i]);
}

void widen(const void* bits, Dtype dtype, u32 count, float* out) {
  const u8* from = static_cast<const u8*>(bits);
  if (dtype == Dtype::f32)
    std::memcpy(out, from, std::size_t{4} * count);
  else if (dtype == Dtype::f16)
    widen_f16(from, count, out);
  else
    widen_bf16(from, count, out);
}

void narrow_f16(const float* values, u32 count, u8* out) {
  u32 i = 0;
#if RLE_LEVEL > 0
  for (; i + 8 <= count; i += 8) {
    const __m256 v = _mm256_loadu_ps(values + i);
    if (_mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)) != 0)
      for (u32 j = i; j < i + 8; ++j) store(out + 2 * j, to_f16(values[j]));
    else
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 2 * i),
                       _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (; i < count; ++i) store(out + 2 * i, to_f16(values[i]));
}

void narrow_bf16(const float* values, u32 count, u8* out) {
  any_u16* halves = reinterpret_cast<any_u16*>(out);
  for (u32 i = 0; i < count; ++i) halves[i] = to_bf16(values[i]);
}

void narrow(const float* values, Dtype dtype, u32 count, void* bits) {
  u8* out = static_cast<u8*>(bits);
  if (dtype == Dtype::f32)
    std::memcpy(out, values, std::size_t{4} * count);
  else if (dtype == Dtype::f16)
    narrow_f16(values, count, out);
  else
    narrow_bf16(values, count, out);
}

// What a receiver holds after it stored the values in the source dtype.
void round_to_source(float* values, Dtype dtype, u32 count) {
  if (dtype == Dtype::f32) return;
  u8 halves[2 * kChunk];
  for (u32 done = 0; done < count; done += kChunk) {
    const u32 take = count - done < kChunk ? count - done : kChunk;
    narrow(values + done, dtype, take, halves);
    widen(halves, dtype, take, values + done);
  }
}

u32 largest_magnitude(const float* values, u32 count) {
  u32 largest = 0;
  for (u32 i = 0; i < count; ++i) {
    const u32 magnitude = bits_of(values[i]) & 0x7FFFFFFFu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// --- writing ---

// Exact for |value| < 2^22: the addition rounds to the nearest even integer.
inline float nearest(float value) { return (value + 12582912.0f) - 12582912.0f; }

// The largest step whose highest level is still finite in float32.
float step_of(float absmax, int levels) {
  if (absmax < kSmallestAbsmax) return 0.0f;
  const float step = absmax / static_cast<float>(levels);
  if (finite_bits(bits_of(step * static_cast<float>(levels)))) return step;
  return float_of(bits_of(step) - 1);
}

bool encode_halves(const Coding& coding, const Rounding& rounding, const float* values,
                   u32 count, u8* codes) {
  const bool bf16 = coding.codec == Codec::bf16;
  if (!rounding.stochastic) {
    if (bf16)
      narrow_bf16(values, count, codes);
    else
      narrow_f16(values, count, codes);
  } else {
    const CounterRng rng(rounding.key);
    for (u32 i = 0; i < count; ++i) {
      const u64 random = rng.at(rounding.elements[i]);
      store(codes + 2 * i, bf16 ? to_bf16_stochastic(values[i], random)
                                : to_f16_stochastic(values[i], random));
    }
  }
  if (coding.dtype == Dtype::f32) {
    const u32 infinity = bf16 ? kBf16Infinity : kF16Infinity;
    const any_u16* halves = reinterpret_cast<const any_u16*>(codes);
    u32 bad = 0;
    for (u32 i = 0; i < count; ++i) bad |= (halves[i] & infinity) == infinity;
    return bad == 0;
  }
  float decoded[kChunk];
  u32 largest = largest_magnitude(values, count);
  for (u32 done = 0; done < count; done += kChunk) {
    const u32 take = count - done < kChunk ? count - done : kChunk;
    widen(codes + 2 * done, bf16 ? Dtype::bf16 : Dtype::f16, take, decoded);
    round_to_source(decoded, coding.dtype, take);
    const u32 seen = largest_magnitude(decoded, take);
    largest = seen > largest ? seen : largest;
  }
  return finite_bits(largest);
}

void levels_to_nearest(const float* values, u32 count, float scale, float most,
                       std::int8_t* codes) {
  for (u32 i = 0; i < count; ++i) {
    float level = nearest(values[i] / scale);
    level = level < most ? level : most;
    level = level > -most ? level : -most;
    codes[i] = static_cast<std::int8_t>(static_cast<std::int32_t>(level));
  }
}

void levels_at_random(const float* values, const Rounding& rounding, u32 begin, u32 count,
                      float scale, int levels, std::int8_t* codes) {
  const CounterRng rng(rounding.key);
  for (u32 i = 0; i < count; ++i) {
    const double place = static_cast<double>(values[i]) / scale +
                         rng.uniform(rounding.elements[begin + i]);
    double level = __builtin_floor(place);
    level = level < levels ? level : levels;
    level = level > -levels ? level : -levels;
    codes[i] = static_cast<std::int8_t>(level);
  }
}

// The entry of the codebook nearest to each value / scale, or one of its two neighbours.
void nf4_levels(const float* values, const Rounding& rounding, u32 begin, u32 count,
                float scale, std::int8_t* codes) {
  if (!rounding.stochastic) {
    for (u32 done = 0; done < count; done += 64) {
      const u32 take = count - done < 64 ? count - done : 64;
      float places[64] = {};
      std::int32_t found[64] = {};
      for (u32 i = 0; i < take; ++i) places[i] = values[done + i] / scale;
      for (int level = 0; level < 15; ++level) {
        const float middle = (kNf4[level] + kNf4[level + 1]) * 0.5f;
        for (u32 i = 0; i < 64; ++i) found[i] += places[i] > middle;
      }
      for (u32 i = 0; i < take; ++i) codes[done + i] = static_cast<std::int8_t>(found[i]);
    }
    return;
  }
  const CounterRng rng(rounding.key);
  for (u32 i = 0; i < count; ++i) {
    const double place = static_cast<double>(values[i]) / scale;
    int below = 0;
    for (int level = 1; level < 15; ++level) below += place >= static_cast<double>(kNf4[level]);
    const double low = kNf4[below];
    const double high = kNf4[below + 1];
    const bool up = (place - low) > rng.uniform(rounding.elements[begin + i]) * (high - low);
    codes[i] = static_cast<std::int8_t>(below + up);
  }
}

bool encode_quantised(const Coding& coding, const Rounding& rounding, const float* values,
                      u32 count, u8* out, u8* scales) {
  const bool nf4 = coding.codec == Codec::nf4;
  const int levels = quant_levels(coding.codec);
  const u32 size = 1u << coding.quant_log2;
  for (u32 begin = 0; begin < count; begin += size, scales += 4) {
    const u32 take = count - begin < size ? count - begin : size;
    const u32 magnitude = largest_magnitude(values + begin, take);
    if (!finite_bits(magnitude)) return false;
    const float scale = step_of(float_of(magnitude), levels);
    store(scales, scale);

    std::int8_t codes[kMaxQuantBlock + 1];
    if (scale == 0.0f)
      std::memset(codes, nf4 ? kNf4Zero : 0, take);
    else if (nf4)
      nf4_levels(values + begin, rounding, begin, take, scale, codes);
    else if (rounding.stochastic)
      levels_at_random(values + begin, rounding, begin, take, scale, levels, codes);
    else
      levels_to_nearest(values + begin, take, scale, static_cast<float>(levels), codes);

    if (coding.codec == Codec::int8) {
      std::memcpy(out, codes, take);
      out += take;
    } else {
      // A quantisation block has an even size, so each one starts in a fresh byte.
      codes[take] = 0;
      const u32 bytes = (take + 1) / 2;
      for (u32 i = 0; i < bytes; ++i)
        out[i] = static_cast<u8>((codes[2 * i] & 15) | (codes[2 * i + 1] & 15) << 4);
      out += bytes;
    }
  }
  return true;
}

bool encode_values(const Coding& coding, const Rounding& rounding, const float* values,
                   u32 count, u8* codes, u8* scales) {
  return is_quantised(coding.codec)
             ? encode_quantised(coding, rounding, values, count, codes, scales)
             : encode_halves(coding, rounding, values, count, codes);
}

// --- reading ---

// Codes of one quantisation block or a part of it, without their scale.
void read_codes(const ValuePlane& plane, u64 index, u32 count, float* out) {
  if (plane.codec == Codec::int8) {
    const u8* codes = plane.values + index;
    for (u32 i = 0; i < count; ++i)
      out[i] = static_cast<float>(static_cast<std::int8_t>(codes[i]));
    return;
  }
  const bool nf4 = plane.codec == Codec::nf4;
  const auto level = [nf4](int nibble) {
    return nf4 ? kNf4[nibble] : static_cast<float>(nibble - ((nibble & 8) << 1));
  };
  u32 i = 0;
  const u8* codes = plane.values + (index >> 1);
  if ((index & 1) != 0) out[i++] = level(*codes++ >> 4);
#if RLE_LEVEL == 2
  const __m512 table =
      nf4 ? _mm512_loadu_ps(kNf4)
          : _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  for (; i + 16 <= count; i += 16, codes += 8) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
    const __m128i low = _mm_and_si128(bytes, _mm_set1_epi8(15));
    const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
    const __m512i nibbles = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high));
    _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(nibbles, table));
  }
#endif
  for (; i + 2 <= count; i += 2, ++codes) {
    out[i] = level(*codes & 15);
    out[i + 1] = level(*codes >> 4);
  }
  if (i < count) out[i] = level(*codes & 15);
}

void decode_quantised(const ValuePlane& plane, u64 start, u32 count, float* out) {
  for (u32 done = 0; done < count;) {
    const u64 index = start + done;
    const u64 block = index >> plane.quant_log2;
    const u64 left = ((block + 1) << plane.quant_log2) - index;
    const u32 take = static_cast<u32>(left < count - done ? left : count - done);
    const float scale = load<float>(plane.scales + 4 * block);
    read_codes(plane, index, take, out + done);
    for (u32 i = done; i < done + take; ++i) out[i] *= scale;
    done += take;
  }
}

void decode_values(const ValuePlane& plane, u64 start, u32 count, float* out) {
  if (is_quantised(plane.codec)) {
    decode_quantised(plane, start, count, out);
    return round_to_source(out, plane.dtype, count);
  }
  if (plane.codec == Codec::raw)
    return widen(plane.values + dtype_bytes(plane.dtype) * start, plane.dtype, count, out);
  const Dtype stored = plane.codec == Codec::bf16 ? Dtype::bf16 : Dtype::f16;
  widen(plane.values + 2 * start, stored, count, out);
  round_to_source(out, plane.dtype, count);
}

Fault check_scales(const ValuePlane& plane) {
  const float most = static_cast<float>(quant_levels(plane.codec));
  const u64 count = scale_plane_bytes(plane.stored, plane.codec, plane.quant_log2) / 4;
  for (u64 i = 0; i < count; ++i) {
    const u32 bits = load<u32>(plane.scales + 4 * i);
    const float highest = through_source(float_of(bits) * most, plane.dtype);
    if (bits >= kF32Infinity || !finite_bits(bits_of(highest))) return {"scale", i};
  }
  return {};
}

// What a code of scale 0 must be, in every half of the byte or the whole.
inline u8 zero_code(Codec codec) { return codec == Codec::nf4 ? kNf4Zero * 0x11 : 0; }

Fault check_codes(const ValuePlane& plane) {
  const bool wide = plane.codec == Codec::int8;
  const u8 zero = zero_code(plane.codec);
  const u64 size = u64{1} << plane.quant_log2;
  for (u64 begin = 0; begin < plane.stored; begin += size) {
    const u64 codes = smaller_of(size, plane.stored - begin);
    const u8* at = plane.values + (wide ? begin : begin / 2);
    const u32 bytes = static_cast<u32>(wide ? codes : codes / 2);
    u8 lowest_found = 0;
    u8 others = 0;
    for (u32 i = 0; i < bytes; ++i) {
      const u8 byte = at[i];
      lowest_found |= wide ? byte == 0x80 : (byte & 15) == 8 || byte >> 4 == 8;
      others |= static_cast<u8>(byte ^ zero);
    }
    if (!wide && (codes & 1) != 0) {
      const u8 half = at[bytes] & 15;
      lowest_found |= half == 8;
      others |= static_cast<u8>(half ^ (zero & 15));
    }
    if (plane.codec != Codec::nf4 && lowest_found) return {"code", wide ? 128u : 8u};
    if (others != 0 && load<float>(plane.scales + 4 * (begin >> plane.quant_log2)) == 0.0f)
      return {"zero_scale", begin >> plane.quant_log2};
  }
  if (!wide && (plane.stored & 1) && plane.values[plane.stored >> 1] >> 4 != 0)
    return {"value_padding"};
  return {};
}

Fault check_values(const ValuePlane& plane, bool allow_nonfinite) {
  if (is_quantised(plane.codec)) {
    const Fault fault = check_scales(plane);
    return fault.reason != nullptr ? fault : check_codes(plane);
  }
  if (allow_nonfinite) return {};
  float chunk[kChunk];
  for (u64 start = 0; start < plane.stored; start += kChunk) {
    const u32 count = static_cast<u32>(smaller_of(kChunk, plane.stored - start));
    decode_values(plane, start, count, chunk);
    if (!finite_bits(largest_magnitude(chunk, count))) return {"nonfinite"};
  }
  return {};
}

template <class Bits>
RawSurvey survey_raw_as(const u8* values, u32 count, Bits infinity) {
  constexpr Bits kMagnitude = static_cast<Bits>(static_cast<Bits>(~Bits{0}) >> 1);
  Bits largest = 0;
  Bits any = 0;
  u32 zeros = 0;
  for (u32 i = 0; i < count; ++i) {
    const Bits bits = load<Bits>(values + sizeof(Bits) * i);
    const Bits magnitude = bits & kMagnitude;
    largest = magnitude > largest ? magnitude : largest;
    any |= bits;
    zeros += bits == 0;
  }
  return {largest >= infinity, any != 0, zeros};
}

RawSurvey survey_raw(const u8* values, Dtype dtype, u32 count) {
  if (dtype == Dtype::f32) return survey_raw_as<u32>(values, count, kF32Infinity);
  return survey_raw_as<u16>(values, count,
                            dtype == Dtype::f16 ? kF16Infinity : kBf16Infinity);
}

// In four fixed partial sums, so the result is the same on every machine.
double sum_of_squares(const float* values, u32 count) {
  double sums[4] = {};
  for (u32 i = 0; i < count; ++i) {
    const double value = values[i];
    sums[i & 3] += value * value;
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

}  // namespace
}  // namespace rle
