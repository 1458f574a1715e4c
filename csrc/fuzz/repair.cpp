#include "repair.h"

#include <algorithm>

#include "bits.h"

namespace rle::fuzz {

namespace {

// No part of a mutant grows beyond this, whatever its numbers say.
constexpr u64 kMostPlaneBytes = u64{1} << 19;

const ManifestRow* row_of(const Expectation& expected, u32 id) {
  for (const ManifestRow& row : expected.rows)
    if (row.id == id) return &row;
  return nullptr;
}

u32 id_of(const AnyTensor& tensor) { return load<u32>(tensor.entry.data()); }

void repair_identity(Anatomy& anatomy) {
  const Expectation expected = read_input(anatomy.control.data(), kControlBytes).expected;
  u8* header = anatomy.header.data();
  std::memcpy(header, kMagic, sizeof kMagic);
  header[4] = kMajor;
  header[5] = kMinor;
  store(header + 6, static_cast<u16>(load<u16>(header + 6) & 3));
  store(header + 32, expected.fingerprint);
  store(header + 40, expected.round);
  store(header + 48, u64{0});

  std::vector<AnyTensor>& tensors = anatomy.tensors;
  const auto less = [](const AnyTensor& a, const AnyTensor& b) { return id_of(a) < id_of(b); };
  const auto same = [](const AnyTensor& a, const AnyTensor& b) { return id_of(a) == id_of(b); };
  const auto unknown = [&](const AnyTensor& t) { return row_of(expected, id_of(t)) == nullptr; };
  tensors.erase(std::remove_if(tensors.begin(), tensors.end(), unknown), tensors.end());
  std::sort(tensors.begin(), tensors.end(), less);
  tensors.erase(std::unique(tensors.begin(), tensors.end(), same), tensors.end());
  for (AnyTensor& tensor : tensors) {
    const ManifestRow* row = row_of(expected, id_of(tensor));
    tensor.entry[4] = static_cast<u8>(row->dtype);
    store(tensor.entry.data() + 8, row->numel);
  }
}

void repair_presence(AnyTensor& tensor) {
  const u64 blocks = tensor.all_blocks();
  if (blocks > 8 * kMostPlaneBytes) return;
  tensor.presence.resize(pieces(blocks, 3));
  if (blocks & 7) tensor.presence.back() &= static_cast<u8>(low_bits(blocks & 7));
}

void repair_counts(AnyTensor& tensor) {
  repair_presence(tensor);
  u64 stored = 0;
  for (std::size_t i = 0; i < tensor.blocks.size(); ++i) {
    u8* descriptor = tensor.blocks[i].descriptor.data();
    const u32 elements = tensor.block_elements(i);
    if (elements == 0) continue;
    u64 count = tensor.blocks[i].stored();
    if (static_cast<Mode>(descriptor[0]) == Mode::dense)
      count = elements;
    else if (elements > 1)
      count = std::min<u64>(count, elements - 1);
    store(descriptor + 2, static_cast<u16>(count - 1));
    stored += count;
  }
  store(tensor.entry.data() + 16, stored);
}

// New bytes are 1: small codes, and values that are neither zero nor infinite.
void repair_planes(AnyTensor& tensor) {
  u64 stored = 0;
  for (const AnyBlock& block : tensor.blocks) stored += block.stored();
  tensor.values.resize(std::min(tensor.plane_bytes(stored), kMostPlaneBytes), 1);
  tensor.scales.resize(std::min(tensor.scale_bytes(stored), kMostPlaneBytes), 1);
  tensor.tail.clear();
}

// Returns where the next body begins.
u64 repair_lengths(AnyTensor& tensor, u64 begin) {
  u64 at = begin + tensor.presence.size() + kDescriptorBytes * tensor.blocks.size();
  for (AnyBlock& block : tensor.blocks) {
    store(block.descriptor.data() + 4, static_cast<u16>(block.stream.size()));
    at += block.stream.size();
  }
  tensor.padding.resize((0 - at) & (kValueAlignment - 1), 0);
  at += tensor.padding.size() + tensor.values.size() + tensor.scales.size() + tensor.tail.size();
  store(tensor.entry.data() + 24, at - begin);
  return at;
}

void repair_header(Anatomy& anatomy, u64 frame_bytes) {
  u8* header = anatomy.header.data();
  const u32 tensors = static_cast<u32>(anatomy.tensors.size());
  u64 total = 0;
  bool lossless = true;
  for (const AnyTensor& tensor : anatomy.tensors) {
    total += tensor.numel();
    lossless &= tensor.codec() == Codec::raw;
  }
  header[6] = static_cast<u8>((header[6] & ~kFlagLossless) | (lossless ? kFlagLossless : 0));
  store(header + 8, frame_bytes);
  store(header + 16, tensors);
  store(header + 20, static_cast<u32>(kEntryBytes * tensors));
  store(header + 24, total);
}

}  // namespace

void repair(Anatomy& anatomy, const Repair& what) {
  if (what.identity) repair_identity(anatomy);
  for (AnyTensor& tensor : anatomy.tensors) {
    if (what.counts) repair_counts(tensor);
    if (what.planes) repair_planes(tensor);
  }
  if (!what.lengths) return;
  u64 at = kHeaderBytes + kEntryBytes * anatomy.tensors.size();
  for (AnyTensor& tensor : anatomy.tensors) at = repair_lengths(tensor, at);
  repair_header(anatomy, at + kTrailerBytes);
}

}  // namespace rle::fuzz
