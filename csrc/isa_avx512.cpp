// The block codec for AVX-512 as in Ice Lake and Zen 4.
#include "isa.h"

#if defined(__x86_64__)

#include <immintrin.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

// All standard headers stand above: what they define inline must not be compiled for
// machines that other translation units do not expect.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2,popcnt,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vpopcntdq"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,popcnt,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vpopcntdq")
#endif

#if !defined(__clang__)
// GCC's own intrinsics start from a register they do not set.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define RLE_LEVEL 2
#include "isa_table.h"

namespace rle {

extern const Isa kAvx512;
const Isa kAvx512 = make_table("avx512");

}  // namespace rle

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
