// The block codec for AVX2, BMI and F16C.
#include "isa.h"

#if defined(__x86_64__)

#include <immintrin.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

// All standard headers stand above: what they define inline must not be compiled for
// machines that other translation units do not expect.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2,popcnt,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,popcnt,f16c")
#endif

#define RLE_LEVEL 1
#include "isa_table.h"

namespace rle {

extern const Isa kAvx2;
const Isa kAvx2 = make_table("avx2");

}  // namespace rle

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
