// Moving values between elements and the value plane, under masks of stored elements.
#pragma once

#include "bits.h"

namespace rle {

// Copies the stored elements to `out`, packed.
template <class Bits>
void gather(const Bits* elements, const u64* masks, u32 count, Bits* out) {
  for (u32 w = 0; w * 64 < count; ++w, elements += 64) {
    u64 m = masks[w];
    if (m == ~u64{0}) {
      std::memcpy(out, elements, 64 * sizeof(Bits));
      out += 64;
    } else {
      for (; m != 0; m &= m - 1) *out++ = elements[lowest(m)];
    }
  }
}

// Writes `values` to the stored elements of zeroed memory.
template <class Bits>
void scatter(const u64* masks, u32 count, const Bits* values, Bits* elements) {
  for (u32 w = 0; w * 64 < count; ++w, elements += 64) {
    u64 m = masks[w];
    if (m == ~u64{0}) {
      std::memcpy(elements, values, 64 * sizeof(Bits));
      values += 64;
    } else {
      for (; m != 0; m &= m - 1) elements[lowest(m)] = *values++;
    }
  }
}

// Adds `values` to the stored elements and leaves the others as they are.
inline void scatter_add(const u64* masks, u32 count, const float* values, float* elements) {
  for (u32 w = 0; w * 64 < count; ++w, elements += 64) {
    u64 m = masks[w];
    if (m == ~u64{0}) {
      for (int i = 0; i < 64; ++i) elements[i] += values[i];
      values += 64;
    } else {
      for (; m != 0; m &= m - 1) elements[lowest(m)] += *values++;
    }
  }
}

}  // namespace rle
