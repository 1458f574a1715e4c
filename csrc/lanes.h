// The steps that differ between instruction sets: elements <-> masks <-> packed values.
//
// RLE_LEVEL is 0 (portable), 1 (AVX2 and BMI) or 2 (AVX-512 of Ice Lake and Zen 4).
#pragma once

#include "bits.h"
#include "isa.h"

namespace rle {
namespace {

#if RLE_LEVEL == 1
// For every byte: the places of its set bits, packed; and for every bit its rank among the
// set ones, or 0x80.
struct ByteTables {
  u8 places[256][8];
  u8 ranks[256][8];
};

constexpr ByteTables make_byte_tables() {
  ByteTables tables{};
  for (int byte = 0; byte < 256; ++byte) {
    u8 rank = 0;
    for (int bit = 0; bit < 8; ++bit) {
      const bool set = byte >> bit & 1;
      if (set) tables.places[byte][rank] = static_cast<u8>(bit);
      tables.ranks[byte][bit] = set ? rank++ : u8{0x80};
    }
  }
  return tables;
}

constexpr ByteTables kBytes = make_byte_tables();

inline __m128i table_row(const u8* row) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row));
}

// Lane numbers of 16 bits, negative for "zero", as a byte shuffle.
inline __m128i shuffle_of(__m128i lanes) {
  const __m128i bytes =
      _mm_add_epi16(_mm_mullo_epi16(lanes, _mm_set1_epi16(0x0202)), _mm_set1_epi16(0x0100));
  return _mm_or_si128(bytes, _mm_srai_epi16(lanes, 15));
}
#endif

// --- masks of 64 elements ---

#if RLE_LEVEL == 0
template <class Bits>
u64 mask_of_64(const Bits* elements) {
  u64 mask = 0;
  for (int i = 0; i < 64; ++i) mask |= u64{elements[i] != 0} << i;
  return mask;
}
#else
inline u64 mask_of_64(const u32* elements) {
#if RLE_LEVEL == 2
  u64 mask = 0;
  for (int i = 0; i < 4; ++i) {
    const __m512i v = _mm512_loadu_si512(elements + 16 * i);
    mask |= static_cast<u64>(_mm512_test_epi32_mask(v, v)) << (16 * i);
  }
  return mask;
#elif RLE_LEVEL == 1
  const __m256i zero = _mm256_setzero_si256();
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  u64 clear = 0;
  for (int half = 0; half < 2; ++half) {
    __m256i is_zero[4];
    for (int i = 0; i < 4; ++i)
      is_zero[i] = _mm256_cmpeq_epi32(
          zero, _mm256_loadu_si256(
                    reinterpret_cast<const __m256i*>(elements + 32 * half + 8 * i)));
    const __m256i bytes =
        _mm256_packs_epi16(_mm256_packs_epi32(is_zero[0], is_zero[1]),
                           _mm256_packs_epi32(is_zero[2], is_zero[3]));
    const __m256i sorted = _mm256_permutevar8x32_epi32(bytes, order);
    clear |= u64{static_cast<u32>(_mm256_movemask_epi8(sorted))} << (32 * half);
  }
  return ~clear;
#endif
}

inline u64 mask_of_64(const u16* elements) {
#if RLE_LEVEL == 2
  u64 mask = 0;
  for (int i = 0; i < 2; ++i) {
    const __m512i v = _mm512_loadu_si512(elements + 32 * i);
    mask |= static_cast<u64>(_mm512_test_epi16_mask(v, v)) << (32 * i);
  }
  return mask;
#elif RLE_LEVEL == 1
  const __m256i zero = _mm256_setzero_si256();
  u64 clear = 0;
  for (int half = 0; half < 2; ++half) {
    __m256i is_zero[2];
    for (int i = 0; i < 2; ++i)
      is_zero[i] = _mm256_cmpeq_epi16(
          zero, _mm256_loadu_si256(
                    reinterpret_cast<const __m256i*>(elements + 32 * half + 16 * i)));
    const __m256i bytes =
        _mm256_permute4x64_epi64(_mm256_packs_epi16(is_zero[0], is_zero[1]), 0xD8);
    clear |= u64{static_cast<u32>(_mm256_movemask_epi8(bytes))} << (32 * half);
  }
  return ~clear;
#endif
}

#endif

// --- places of set bits ---

#if RLE_LEVEL == 2
inline bool none_of_8(const u64* masks) {
  const __m512i m = _mm512_loadu_si512(masks);
  return _mm512_test_epi64_mask(m, m) == 0;
}
#endif

// Writes 16-bit places of the set bits of `words` masks, rising; returns how many. Stores
// up to 64 places more than that.
inline u32 places_of(const u64* masks, u32 words, u16* out) {
  u16* at = out;
  for (u32 w = 0; w < words; ++w) {
    u64 m = masks[w];
#if RLE_LEVEL == 2
    // Sparse blocks are mostly words without a bit; denser ones must not be guessed at.
    if (w % 8 == 0 && w + 8 <= words && none_of_8(masks + w)) {
      w += 7;
      continue;
    }
    const __m512i base = _mm512_set1_epi16(static_cast<short>(w * 64));
    const __m512i places = _mm512_maskz_compress_epi8(m, _mm512_set_epi64(
        0x3F3E3D3C3B3A3938, 0x3736353433323130, 0x2F2E2D2C2B2A2928, 0x2726252423222120,
        0x1F1E1D1C1B1A1918, 0x1716151413121110, 0x0F0E0D0C0B0A0908, 0x0706050403020100));
    const int count = popcount(m);
    _mm512_storeu_si512(
        at, _mm512_add_epi16(base, _mm512_cvtepu8_epi16(_mm512_castsi512_si256(places))));
    if (count > 32)
      _mm512_storeu_si512(
          at + 32, _mm512_add_epi16(base, _mm512_cvtepu8_epi16(
                                              _mm512_extracti64x4_epi64(places, 1))));
    at += count;
#elif RLE_LEVEL == 1
    if (m == 0) continue;
    for (u32 base = w * 64; base < w * 64 + 64; base += 8, m >>= 8) {
      const u32 byte = m & 255;
      const __m128i places = _mm_cvtepu8_epi16(table_row(kBytes.places[byte]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(at),
                       _mm_add_epi16(places, _mm_set1_epi16(static_cast<short>(base))));
      at += popcount(byte);
    }
#else
    for (; m != 0; m &= m - 1) *at++ = static_cast<u16>(w * 64 + lowest(m));
#endif
  }
  return static_cast<u32>(at - out);
}

// --- elements -> packed values ---

// Appends the elements of a group of 64 that have a bit set.
#if RLE_LEVEL == 0
template <class Bits>
Bits* gather_64(const Bits* elements, Bits* out) {
  for (int i = 0; i < 64; ++i) {
    *out = elements[i];
    out += elements[i] != 0;
  }
  return out;
}
#else
inline u32* gather_64(const u32* elements, u32* out) {
#if RLE_LEVEL == 2
  for (int i = 0; i < 4; ++i) {
    const __m512i v = _mm512_loadu_si512(elements + 16 * i);
    const __mmask16 m = _mm512_test_epi32_mask(v, v);
    // To a register first: a compressing store is several times slower on Zen 4.
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(m, v));
    out += popcount(m);
  }
#elif RLE_LEVEL == 1
  for (int i = 0; i < 8; ++i) {
    const __m256i v =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(elements + 8 * i));
    const __m256i is_zero = _mm256_cmpeq_epi32(v, _mm256_setzero_si256());
    const u32 byte = 255 ^ static_cast<u32>(_mm256_movemask_ps(_mm256_castsi256_ps(is_zero)));
    const __m256i places = _mm256_cvtepu8_epi32(table_row(kBytes.places[byte]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                        _mm256_permutevar8x32_epi32(v, places));
    out += popcount(byte);
  }
#endif
  return out;
}

inline u16* gather_64(const u16* elements, u16* out) {
#if RLE_LEVEL == 2
  for (int i = 0; i < 2; ++i) {
    const __m512i v = _mm512_loadu_si512(elements + 32 * i);
    const __mmask32 m = _mm512_test_epi16_mask(v, v);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi16(m, v));
    out += popcount(m);
  }
#elif RLE_LEVEL == 1
  for (int i = 0; i < 8; ++i) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(elements + 8 * i));
    const __m128i is_zero = _mm_cmpeq_epi16(v, _mm_setzero_si128());
    const u32 byte =
        255 & ~static_cast<u32>(_mm_movemask_epi8(_mm_packs_epi16(is_zero, is_zero)));
    const __m128i places = _mm_cvtepu8_epi16(table_row(kBytes.places[byte]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(v, shuffle_of(places)));
    out += popcount(byte);
  }
#endif
  return out;
}

#endif

// --- packed values -> elements ---

#if RLE_LEVEL == 2
inline void put_lanes(u8* out, __m512i lanes, bool stream) {
  if (stream)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out), lanes);
  else
    _mm512_storeu_si512(out, lanes);
}
#elif RLE_LEVEL == 1
inline void put_lanes(u8* out, __m256i lanes, bool stream) {
  if (stream)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out), lanes);
  else
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), lanes);
}
#endif

// Writes 64 elements; reads up to 64 bytes of `values` more than it uses.
#if RLE_LEVEL == 0
template <class Bits>
const Bits* expand_64(u64 mask, const Bits* values, bool, Bits* out) {
  std::memset(out, 0, 64 * sizeof *out);
  for (; mask != 0; mask &= mask - 1) out[lowest(mask)] = *values++;
  return values;
}
#else
inline const u32* expand_64(u64 mask, const u32* values, bool stream, u32* out) {
#if RLE_LEVEL == 2
  for (int i = 0; i < 4; ++i) {
    const __mmask16 m = static_cast<__mmask16>(mask >> (16 * i));
    put_lanes(reinterpret_cast<u8*>(out + 16 * i),
              _mm512_maskz_expand_epi32(m, _mm512_loadu_si512(values)), stream);
    values += popcount(m);
  }
#elif RLE_LEVEL == 1
  for (int i = 0; i < 8; ++i, mask >>= 8) {
    const u32 byte = mask & 255;
    const __m256i ranks = _mm256_cvtepi8_epi32(table_row(kBytes.ranks[byte]));
    const __m256i v = _mm256_permutevar8x32_epi32(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)), ranks);
    put_lanes(reinterpret_cast<u8*>(out + 8 * i),
              _mm256_andnot_si256(_mm256_srai_epi32(ranks, 31), v), stream);
    values += popcount(byte);
  }
#endif
  return values;
}

inline const u16* expand_64(u64 mask, const u16* values, bool stream, u16* out) {
#if RLE_LEVEL == 2
  for (int i = 0; i < 2; ++i) {
    const __mmask32 m = static_cast<__mmask32>(mask >> (32 * i));
    put_lanes(reinterpret_cast<u8*>(out + 32 * i),
              _mm512_maskz_expand_epi16(m, _mm512_loadu_si512(values)), stream);
    values += popcount(m);
  }
#elif RLE_LEVEL == 1
  for (int i = 0; i < 8; i += 2, mask >>= 16) {
    __m128i halves[2];
    for (int j = 0; j < 2; ++j) {
      const u32 byte = mask >> (8 * j) & 255;
      const __m128i ranks = _mm_cvtepi8_epi16(table_row(kBytes.ranks[byte]));
      halves[j] = _mm_shuffle_epi8(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(values)), shuffle_of(ranks));
      values += popcount(byte);
    }
    put_lanes(reinterpret_cast<u8*>(out + 8 * i), _mm256_set_m128i(halves[1], halves[0]),
              stream);
  }
#endif
  return values;
}

#endif

// Adds weight * value to the elements under the mask and leaves the others as they are.
inline const float* add_64(u64 mask, const float* values, float weight, float* out) {
#if RLE_LEVEL == 2
  const __m512 weights = _mm512_set1_ps(weight);
  for (int i = 0; i < 4; ++i) {
    const __mmask16 m = static_cast<__mmask16>(mask >> (16 * i));
    const __m512 product = _mm512_mul_ps(
        weights, _mm512_maskz_expand_ps(m, _mm512_loadu_ps(values)));
    const __m512 old = _mm512_loadu_ps(out + 16 * i);
    _mm512_storeu_ps(out + 16 * i, _mm512_mask_add_ps(old, m, old, product));
    values += popcount(m);
  }
#elif RLE_LEVEL == 1
  const __m256 weights = _mm256_set1_ps(weight);
  for (int i = 0; i < 8; ++i, mask >>= 8) {
    const u32 byte = mask & 255;
    const __m256i ranks = _mm256_cvtepi8_epi32(table_row(kBytes.ranks[byte]));
    const __m256 product = _mm256_mul_ps(
        weights, _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), ranks));
    const __m256 old = _mm256_loadu_ps(out + 8 * i);
    _mm256_storeu_ps(out + 8 * i, _mm256_blendv_ps(_mm256_add_ps(old, product), old,
                                                   _mm256_castsi256_ps(ranks)));
    values += popcount(byte);
  }
#else
  for (; mask != 0; mask &= mask - 1) out[lowest(mask)] += weight * *values++;
#endif
  return values;
}

// --- plain bytes ---

inline void copy_bytes(u8* out, const u8* from, u64 bytes, bool stream) {
#if RLE_LEVEL > 0
  constexpr u64 kLine = 64;
  if (stream && bytes >= 4 * kLine) {
    const u64 head = (0 - reinterpret_cast<std::uintptr_t>(out)) & (kLine - 1);
    std::memcpy(out, from, head);
    out += head;
    from += head;
    bytes -= head;
    for (; bytes >= kLine; out += kLine, from += kLine, bytes -= kLine) {
#if RLE_LEVEL == 2
      put_lanes(out, _mm512_loadu_si512(from), true);
#else
      const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32));
      put_lanes(out, low, true);
      put_lanes(out + 32, high, true);
#endif
    }
  }
#else
  (void)stream;
#endif
  if (bytes > 0) std::memcpy(out, from, bytes);
}

inline void zero_bytes(u8* out, u64 bytes, bool stream) {
#if RLE_LEVEL > 0
  constexpr u64 kLine = 64;
  if (stream && bytes >= 4 * kLine) {
    const u64 head = (0 - reinterpret_cast<std::uintptr_t>(out)) & (kLine - 1);
    std::memset(out, 0, head);
    out += head;
    bytes -= head;
    for (; bytes >= kLine; out += kLine, bytes -= kLine) {
#if RLE_LEVEL == 2
      put_lanes(out, _mm512_setzero_si512(), true);
#else
      put_lanes(out, _mm256_setzero_si256(), true);
      put_lanes(out + 32, _mm256_setzero_si256(), true);
#endif
    }
  }
#else
  (void)stream;
#endif
  if (bytes > 0) std::memset(out, 0, bytes);
}

// Streamed stores before it are seen before all stores behind it.
inline void fence() {
#if RLE_LEVEL > 0
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace rle
