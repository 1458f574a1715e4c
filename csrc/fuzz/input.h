// What the bytes of a fuzz input mean: three control bytes, then a frame.
//
//   byte 0  which of the built-in manifests the receiver has
//   byte 1  bit 0: non-finite values are allowed; the others: options of repacking
//   byte 2  the receiver's round
#pragma once

#include "rle.h"

namespace rle::fuzz {

constexpr u64 kControlBytes = 3;

// What the writer and the reader know; a new codec belongs here.
constexpr Codec kCodecs[] = {Codec::raw, Codec::bf16, Codec::f16,
                              Codec::int8, Codec::nf4, Codec::int4};

struct Input {
  Expectation expected;
  bool allow_nonfinite;
  PackOptions repack;
  const u8* frame;
  u64 length;
};

// Needs at least kControlBytes bytes.
Input read_input(const u8* bytes, u64 size);

// A small, fixed family. Few have many elements, so that most executions are short.
std::size_t manifest_count();
const std::vector<ManifestRow>& manifest_rows(std::size_t which);
u64 manifest_fingerprint(std::size_t which);

}  // namespace rle::fuzz
