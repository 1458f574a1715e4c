// A fuzz input taken apart, so that a part can change and the rest follow.
#pragma once

#include <array>

#include "input.h"

namespace rle::fuzz {

using Bytes = std::vector<u8>;

struct AnyBlock {
  std::array<u8, kDescriptorBytes> descriptor;
  Bytes stream;

  u64 stored() const { return u64{load<u16>(descriptor.data() + 2)} + 1; }
};

struct AnyTensor {
  std::array<u8, kEntryBytes> entry;
  Bytes presence;
  std::vector<AnyBlock> blocks;
  Bytes padding;
  Bytes values;
  Bytes scales;
  Bytes tail;  // whatever the parts above do not explain

  u64 numel() const { return load<u64>(entry.data() + 8); }
  Codec codec() const { return static_cast<Codec>(entry[5]); }
  Dtype dtype() const { return static_cast<Dtype>(entry[4]); }
  u64 plane_bytes(u64 stored) const;
  u64 scale_bytes(u64 stored) const;
  int block_log2() const { return entry[6] < 32 ? entry[6] : 31; }
  u64 all_blocks() const { return pieces(numel(), block_log2()); }
  // Elements of the nth block that is present; 0 if the presence bits have no such block.
  u32 block_elements(std::size_t nth) const;
};

struct Anatomy {
  std::array<u8, kControlBytes> control;
  std::array<u8, kHeaderBytes> header;
  std::vector<AnyTensor> tensors;
  std::array<u8, kTrailerBytes> trailer;
};

// Never fails: what makes no sense ends up in a tail.
Anatomy take_apart(const u8* bytes, u64 size);

// Unless something was changed in between, the bytes that were taken apart; with hashes
// that are right, if asked.
Bytes assemble(const Anatomy& anatomy, bool right_hashes);

}  // namespace rle::fuzz
