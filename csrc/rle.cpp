#include "rle.h"

#include <algorithm>

#include "masked.h"

namespace rle {

namespace {

// Visits present blocks: visit(block number, nth present, descriptor, first value's number).
template <class Visit>
void for_each_present(const Frame& frame, const Entry& entry, Visit visit) {
  u64 nth = 0;
  u64 start = 0;
  for (u64 b = 0; b < entry.blocks(); ++b) {
    if (!frame.present(entry, b)) continue;
    const BlockIndex block = frame.descriptor(entry, nth++, b);
    visit(b, block, start);
    start += block.stored;
  }
}

// Enough for any block of the tensor; small tensors must not pay for a full block.
u64 scratch_elements(const Entry& entry) { return std::min<u64>(entry.numel, kMaxBlock); }

template <class Bits>
void decode_as(const Frame& frame, const Entry& entry, const Masks& masks, Bits* out) {
  const ValuePlane plane = frame.plane(entry);
  const u64* block_masks = masks.data();
  const u64 scratch = plane.codec == Codec::raw ? 0 : scratch_elements(entry);
  std::vector<float> floats(scratch);
  std::vector<Bits> bits(scratch);
  u64 written = 0;
  for_each_present(frame, entry, [&](u64 b, const BlockIndex& block, u64 start) {
    const Bits* values = reinterpret_cast<const Bits*>(plane.values) + start;
    if (plane.codec != Codec::raw) {
      decode_values(plane, start, block.stored, floats.data());
      for (u32 i = 0; i < block.stored; ++i) {
        if (sizeof(Bits) == 4)
          bits[i] = static_cast<Bits>(bits_of(floats[i]));
        else
          bits[i] = plane.dtype == Dtype::f16 ? to_f16(floats[i]) : to_bf16(floats[i]);
      }
      values = bits.data();
    }
    const u64 begin = b << entry.block_log2;
    const bool dense = block.mode == Mode::dense;
    const u64 end = begin + block.elements;
    // Zeros are written just before the values, while the block is in the cache.
    std::memset(out + written, 0, ((dense ? begin : end) - written) * sizeof(Bits));
    written = end;
    if (dense) {
      std::memcpy(out + begin, values, sizeof(Bits) * block.stored);
      return;
    }
    scatter(block_masks, block.elements, values, out + begin);
    block_masks += mask_words(block.elements);
  });
  std::memset(out + written, 0, (entry.numel - written) * sizeof(Bits));
}

}  // namespace

Masks validate(const Frame& frame, const Entry& entry, bool allow_nonfinite) {
  const ValuePlane plane = frame.plane(entry);
  u64 words = 0;
  for_each_present(frame, entry, [&](u64, const BlockIndex& block, u64) {
    if (block.mode != Mode::dense) words += mask_words(block.elements);
  });
  // A vector that grows would hold twice as much, and three times while it is moved.
  Masks masks;
  masks.reserve(words);
  u64 at = entry.index;
  for_each_present(frame, entry, [&](u64, const BlockIndex& block, u64 start) {
    const bool dense = block.mode == Mode::dense;
    if (!dense) {
      masks.resize(masks.size() + mask_words(block.elements), 0);
      decode_index(block, frame.bytes + at,
                   masks.data() + masks.size() - mask_words(block.elements));
      at += block.index_bytes;
    }
    if (plane.codec == Codec::raw)
      check_raw_block(plane, start, block.stored, dense, allow_nonfinite);
  });
  if (plane.codec != Codec::raw) check_values(plane, allow_nonfinite);
  return masks;
}

void decode(const Frame& frame, const Entry& entry, const Masks& masks, void* out) {
  if (entry.numel == 0) return;
  if (entry.dtype == Dtype::f32)
    decode_as(frame, entry, masks, static_cast<u32*>(out));
  else
    decode_as(frame, entry, masks, static_cast<u16*>(out));
}

void accumulate(const Frame& frame, const Entry& entry, const Masks& masks, float weight,
                float* out) {
  const ValuePlane plane = frame.plane(entry);
  const u64* block_masks = masks.data();
  std::vector<float> products(scratch_elements(entry));
  for_each_present(frame, entry, [&](u64 b, const BlockIndex& block, u64 start) {
    // Products go through memory, so no compiler can fuse them with the addition: the
    // result has the same bits on machines with and without fused multiply-add.
    decode_values(plane, start, block.stored, products.data());
    for (u32 i = 0; i < block.stored; ++i) products[i] *= weight;
    float* to = out + (b << entry.block_log2);
    if (block.mode == Mode::dense) {
      for (u32 i = 0; i < block.stored; ++i) to[i] += products[i];
      return;
    }
    scatter_add(block_masks, block.elements, products.data(), to);
    block_masks += mask_words(block.elements);
  });
}

}  // namespace rle
