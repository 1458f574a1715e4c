#include "anatomy.h"

#include <algorithm>

#include "bits.h"

namespace rle::fuzz {

namespace {

class Cursor {
 public:
  Cursor(const u8* at, u64 left) : at_(at), left_(left) {}

  Bytes take(u64 count) {
    count = std::min(count, left_);
    Bytes part(at_, at_ + count);
    at_ += count;
    left_ -= count;
    return part;
  }
  template <std::size_t N>
  std::array<u8, N> take() {
    std::array<u8, N> part{};
    const u64 count = std::min<u64>(N, left_);
    std::copy_n(at_, count, part.data());
    at_ += count;
    left_ -= count;
    return part;
  }
  u64 left() const { return left_; }

 private:
  const u8* at_;
  u64 left_;
};

u64 present_blocks(const AnyTensor& tensor) {
  u64 count = 0;
  for (const u8 byte : tensor.presence) count += popcount(byte);
  return count;
}

void read_body(Cursor body, u64 offset, AnyTensor& tensor) {
  const u64 whole = body.left();
  tensor.presence = body.take(pieces(tensor.all_blocks(), 3));
  const u64 present = std::min(present_blocks(tensor), body.left() / kDescriptorBytes);
  for (u64 i = 0; i < present; ++i)
    tensor.blocks.push_back({body.take<kDescriptorBytes>(), {}});
  u64 stored = 0;
  for (AnyBlock& block : tensor.blocks) {
    block.stream = body.take(load<u16>(block.descriptor.data() + 4));
    stored += block.stored();
  }
  tensor.padding = body.take((0 - (offset + whole - body.left())) & (kValueAlignment - 1));
  tensor.values = body.take(tensor.plane_bytes(stored));
  tensor.scales = body.take(tensor.scale_bytes(stored));
  tensor.tail = body.take(body.left());
}

void append(Bytes& to, const Bytes& part) { to.insert(to.end(), part.begin(), part.end()); }

Bytes body_of(const AnyTensor& tensor) {
  Bytes body = tensor.presence;
  for (const AnyBlock& block : tensor.blocks)
    body.insert(body.end(), block.descriptor.begin(), block.descriptor.end());
  for (const AnyBlock& block : tensor.blocks) append(body, block.stream);
  for (const Bytes* part : {&tensor.padding, &tensor.values, &tensor.scales, &tensor.tail})
    append(body, *part);
  return body;
}

}  // namespace

u64 AnyTensor::plane_bytes(u64 stored) const {
  return entry[4] > 2 ? 4 * stored : value_plane_bytes(stored, codec(), dtype());
}

u64 AnyTensor::scale_bytes(u64 stored) const {
  return scale_plane_bytes(stored, codec(), entry[7] & 31);
}

u32 AnyTensor::block_elements(std::size_t nth) const {
  const int log2 = block_log2();
  for (u64 b = 0; b < 8 * presence.size(); ++b) {
    if (!(presence[b >> 3] >> (b & 7) & 1) || nth-- > 0) continue;
    const u64 begin = b << log2;
    return begin < numel() ? static_cast<u32>(std::min(numel() - begin, u64{1} << log2)) : 0;
  }
  return 0;
}

Anatomy take_apart(const u8* bytes, u64 size) {
  Cursor cursor(bytes, size);
  Anatomy anatomy{cursor.take<kControlBytes>(), cursor.take<kHeaderBytes>(), {}, {}};
  const u64 tensors =
      std::min<u64>(load<u32>(anatomy.header.data() + 16), cursor.left() / kEntryBytes);
  for (u64 i = 0; i < tensors; ++i)
    anatomy.tensors.push_back({cursor.take<kEntryBytes>(), {}, {}, {}, {}, {}, {}});
  u64 offset = kHeaderBytes + kEntryBytes * tensors;
  for (AnyTensor& tensor : anatomy.tensors) {
    const u64 bodies = cursor.left() - std::min(cursor.left(), kTrailerBytes);
    const Bytes body = cursor.take(std::min(load<u64>(tensor.entry.data() + 24), bodies));
    read_body(Cursor(body.data(), body.size()), offset, tensor);
    offset += body.size();
  }
  if (!anatomy.tensors.empty() && cursor.left() > kTrailerBytes)
    append(anatomy.tensors.back().tail, cursor.take(cursor.left() - kTrailerBytes));
  anatomy.trailer = cursor.take<kTrailerBytes>();
  return anatomy;
}

Bytes assemble(const Anatomy& anatomy, bool right_hashes) {
  Bytes directory;
  Bytes bodies;
  for (const AnyTensor& tensor : anatomy.tensors) {
    directory.insert(directory.end(), tensor.entry.begin(), tensor.entry.end());
    append(bodies, body_of(tensor));
  }
  auto header = anatomy.header;
  auto trailer = anatomy.trailer;
  if (right_hashes) {
    store(header.data() + 56, header_hash(header.data(), directory.data(), directory.size()));
    store(trailer.data(), xxh3(bodies.data(), bodies.size()));
  }
  Bytes result(anatomy.control.begin(), anatomy.control.end());
  result.insert(result.end(), header.begin(), header.end());
  append(result, directory);
  append(result, bodies);
  result.insert(result.end(), trailer.begin(), trailer.end());
  return result;
}

}  // namespace rle::fuzz
