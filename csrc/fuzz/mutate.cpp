#include "mutate.h"

#include <algorithm>

#include "repair.h"

// libFuzzer's own mutations of plain bytes; the driver without libFuzzer has simpler ones.
extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* bytes, std::size_t size,
                                        std::size_t most);

namespace rle::fuzz {

namespace {

constexpr u64 kBoundaries[] = {0,      1,      2,          7,          8,          31,
                               63,     64,     65,         127,        128,        255,
                               4095,   4096,   4097,       32767,      65535,      65536,
                               1 << 30, (u64{1} << 31) - 1, (u64{1} << 32) - 1, u64{1} << 32,
                               u64{1} << 63, ~u64{0}};
constexpr u32 kFloats[] = {0,          0x80000000, 1,          0x807FFFFF, 0x00800000, 0x3F800000,
                           0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0x38800000,
                           0x477FF000, 0x477FEFFF, 0x33000000, 0x0DA24260};
constexpr int kDirectoryFields[][2] = {{0, 4}, {4, 1}, {5, 1}, {6, 1}, {7, 1},
                                       {8, 8}, {16, 8}, {24, 8}};
constexpr int kHeaderFields[][2] = {{0, 4},  {4, 1},  {5, 1},  {6, 2},  {8, 8}, {16, 4},
                                    {20, 4}, {24, 8}, {32, 8}, {40, 8}, {48, 8}};

template <class Items>
auto& any_of(Items& items, Random& random) {
  return items[random.below(std::size(items))];
}

// A boundary, a step from the old value, a flipped bit, or a small number.
void change_field(u8* at, int width, Random& random) {
  u64 value = 0;
  std::memcpy(&value, at, width);
  switch (random.below(4)) {
    case 0: value = any_of(kBoundaries, random); break;
    case 1: value += random.below(9) - 4; break;
    case 2: value ^= u64{1} << random.below(8 * width); break;
    default: value = random.below(20);
  }
  std::memcpy(at, &value, width);
}

void change_bytes(Bytes& bytes, Random& random) {
  const std::size_t size = bytes.size();
  switch (random.below(5)) {
    case 0:  // cut
      bytes.resize(random.below(size + 1));
      break;
    case 1:  // extend
      bytes.resize(size + 1 + random.below(8), static_cast<u8>(random.one_in(2) ? 0 : 255));
      break;
    case 2:
      if (size > 0) any_of(bytes, random) ^= static_cast<u8>(1u << random.below(8));
      break;
    case 3: {  // a stretch of one byte
      const std::size_t begin = random.below(size);
      const std::size_t count = std::min<std::size_t>(size - begin, random.below(40));
      std::fill_n(bytes.begin() + begin, count, static_cast<u8>(random.next()));
      break;
    }
    default:
      bytes.resize(size + 16);
      bytes.resize(LLVMFuzzerMutate(bytes.data(), size, bytes.size()));
  }
}

void change_numbers(Bytes& plane, std::size_t width, Random& random) {
  if (plane.size() < width) return;
  u8* at = plane.data() + width * random.below(plane.size() / width);
  const u32 bits = any_of(kFloats, random);
  store(at, static_cast<u8>(random.next()));
  if (width == 4) store(at, bits);
  if (width == 2) store(at, static_cast<u16>(random.one_in(2) ? bits >> 16 : bits));
}

class BitAppender {
 public:
  explicit BitAppender(Bytes& bytes) : bytes_(bytes) {}

  void put(u64 value, unsigned bits) {
    for (unsigned i = 0; i < bits; ++i, ++used_) {
      if (used_ % 8 == 0) bytes_.push_back(0);
      bytes_.back() = static_cast<u8>(bytes_.back() | (value >> i & 1) << used_ % 8);
    }
  }
  void rice(u64 value, unsigned k) {
    for (u64 zeros = value >> k; zeros > 0; --zeros) put(0, 1);
    put(1, 1);
    put(value, k);
  }

 private:
  Bytes& bytes_;
  u64 used_ = 0;
};

// A stream of the block's mode that is legal, or one code away from it.
void write_stream(AnyBlock& block, u32 elements, Random& random) {
  if (elements < 2 || elements > kMaxBlock) return;
  u8* descriptor = block.descriptor.data();
  descriptor[0] = static_cast<u8>(2 + random.below(4));
  const Mode mode = static_cast<Mode>(descriptor[0]);
  const unsigned k0 = random.below(random.one_in(4) ? 16 : 6);
  const unsigned k1 = random.below(random.one_in(4) ? 16 : 6);
  block.stream.clear();
  BitAppender bits(block.stream);
  u64 stored = 0;
  if (mode == Mode::bitmap) {
    const u64 every = 1 + random.below(70);
    for (u32 i = 0; i < elements; ++i) {
      const bool set = stored + 1 < elements && random.one_in(every);
      bits.put(set, 1);
      stored += set;
    }
  } else {
    const bool spans = mode == Mode::spans;
    const u64 codes = 1 + random.below(60);
    u64 position = 0;
    for (u64 i = 0; i < codes && position < elements; ++i) {
      const u64 gap = random.below(std::min<u64>(2ull << k0, elements - position));
      bits.rice(gap, k0);
      position += gap + 1;
      ++stored;
      if (!spans || i + 1 == codes) continue;
      const u64 length = random.below(2ull << k1);
      bits.rice(length, k1);
      position += length;
      stored += length;
    }
    if (mode == Mode::clear_gaps) stored = elements - std::min<u64>(stored, elements - 1);
  }
  const unsigned k = mode == Mode::spans ? k0 | k1 << 4 : k0;
  descriptor[1] = static_cast<u8>(mode == Mode::bitmap ? 0 : k);
  store(descriptor + 2, static_cast<u16>(std::max<u64>(stored, 1) - 1));
}

void change_block(AnyTensor& tensor, Random& random) {
  if (tensor.blocks.empty()) return;
  const std::size_t nth = random.below(tensor.blocks.size());
  AnyBlock& block = tensor.blocks[nth];
  u8* descriptor = block.descriptor.data();
  switch (random.below(6)) {
    case 0:
      descriptor[0] = static_cast<u8>(random.below(8));
      descriptor[1] &= random.one_in(4) ? 255 : 15;
      break;
    case 1:
      descriptor[1] = static_cast<u8>(random.below(random.one_in(4) ? 256 : 16));
      break;
    case 2:
      change_field(descriptor + (random.one_in(8) ? 2 + 2 * random.below(3) : 2), 2, random);
      break;
    case 3: write_stream(block, tensor.block_elements(nth), random); break;
    case 4: std::swap(block.stream, any_of(tensor.blocks, random).stream); break;
    default: change_bytes(block.stream, random);
  }
}

// A presence bit, and mostly the block that comes or goes with it.
void change_presence(AnyTensor& tensor, Random& random) {
  if (tensor.presence.empty()) return;
  const bool spare = random.one_in(16);
  const u64 bit =
      random.below(std::min(spare ? ~u64{0} : tensor.all_blocks(), 8 * tensor.presence.size()));
  u64 nth = 0;
  for (u64 b = 0; b < bit; ++b) nth += tensor.presence[b >> 3] >> (b & 7) & 1;
  u8& byte = tensor.presence[bit >> 3];
  byte ^= static_cast<u8>(1u << (bit & 7));
  if (random.one_in(8)) return;
  const bool added = byte >> (bit & 7) & 1;
  nth = std::min<u64>(nth, tensor.blocks.size());
  if (added) {
    const auto at = tensor.blocks.insert(tensor.blocks.begin() + nth, AnyBlock{});
    write_stream(*at, tensor.block_elements(nth), random);
  } else if (nth < tensor.blocks.size()) {
    tensor.blocks.erase(tensor.blocks.begin() + nth);
  }
}

// Another codec, block size or quantisation block that is legal by itself.
void change_coding(AnyTensor& tensor, Random& random) {
  tensor.entry[5] = static_cast<u8>(any_of(kCodecs, random));
  if (random.one_in(16)) tensor.entry[5] = static_cast<u8>(random.next());
  tensor.entry[7] = is_quantised(tensor.codec()) ? static_cast<u8>(5 + random.below(8)) : 0;
  if (random.one_in(4)) tensor.entry[6] = static_cast<u8>(12 + random.below(5));
}

void change_tensors(Anatomy& anatomy, Random& random) {
  std::vector<AnyTensor>& tensors = anatomy.tensors;
  const std::size_t at = random.below(tensors.size());
  if (random.one_in(2)) {
    tensors.erase(tensors.begin() + at);
  } else if (random.one_in(2)) {
    tensors.insert(tensors.begin() + at, AnyTensor(tensors[at]));
  } else {
    std::swap(tensors[at], any_of(tensors, random));
  }
}

// More tensors than the frame has room for, and the directory length that goes with them.
void claim_tensors(Anatomy& anatomy, Random& random) {
  const u32 tensors = static_cast<u32>(anatomy.tensors.size() + random.below(12));
  store(anatomy.header.data() + 16, tensors);
  store(anatomy.header.data() + 20, static_cast<u32>(kEntryBytes * tensors));
}

void change_something(Anatomy& anatomy, Random& random) {
  if (random.one_in(40)) {
    const auto& field = any_of(kHeaderFields, random);
    return change_field(anatomy.header.data() + field[0], field[1], random);
  }
  if (random.one_in(200)) {
    any_of(anatomy.control, random) = static_cast<u8>(random.next());
    return;
  }
  if (random.one_in(8)) {
    anatomy.control[1] ^= 1;
    return;
  }
  if (anatomy.tensors.empty()) return;
  if (random.one_in(20)) return change_tensors(anatomy, random);
  AnyTensor& tensor = any_of(anatomy.tensors, random);
  if (random.one_in(20)) {
    const auto& field = any_of(kDirectoryFields, random);
    return change_field(tensor.entry.data() + field[0], field[1], random);
  }
  const std::size_t width = is_quantised(tensor.codec()) ? 1
                            : tensor.codec() == Codec::raw && tensor.dtype() == Dtype::f32 ? 4
                                                                                           : 2;
  switch (random.below(9)) {
    case 0: return change_presence(tensor, random);
    case 1: return change_coding(tensor, random);
    case 2: return change_bytes(tensor.values, random);
    case 3: return change_numbers(tensor.values, width, random);
    case 4: return change_numbers(tensor.scales, 4, random);
    default: return change_block(tensor, random);
  }
}

}  // namespace

Bytes mutated(const u8* bytes, u64 size, Random& random) {
  Anatomy anatomy = take_apart(bytes, size);
  for (u64 changes = 1 + random.below(4); changes > 0; --changes)
    change_something(anatomy, random);
  Repair what;
  what.identity = !random.one_in(12);
  what.counts = !random.one_in(16);
  what.planes = !random.one_in(16);
  what.lengths = !random.one_in(16);
  repair(anatomy, what);
  if (random.one_in(16)) change_something(anatomy, random);
  if (random.one_in(100)) claim_tensors(anatomy, random);
  Bytes result = assemble(anatomy, !random.one_in(100));
  if (random.one_in(100)) change_bytes(result, random);
  return result;
}

Bytes crossed(const u8* left, u64 left_size, const u8* right, u64 right_size, Random& random) {
  Anatomy result = take_apart(left, left_size);
  const Anatomy other = take_apart(right, right_size);
  if (result.tensors.empty() || other.tensors.empty()) return assemble(result, true);
  AnyTensor& tensor = any_of(result.tensors, random);
  const AnyTensor& from = any_of(other.tensors, random);
  if (random.one_in(2)) {
    // The other body under this tensor's id, dtype and number of elements.
    const auto entry = tensor.entry;
    tensor = from;
    std::copy_n(entry.begin(), 5, tensor.entry.begin());
    std::copy_n(entry.begin() + 8, 8, tensor.entry.begin() + 8);
  } else if (!tensor.blocks.empty() && !from.blocks.empty()) {
    any_of(tensor.blocks, random) = any_of(from.blocks, random);
  }
  repair(result, {});
  return assemble(result, true);
}

}  // namespace rle::fuzz
