// From bytes to a checked Frame: every length is compared before it is used, and nothing
// is allocated from a number that the frame carries beyond what its own size pays for.
#include <string>

#include "rle.h"

namespace rle {

namespace {

[[noreturn]] void refuse(const char* reason, const std::string& message) {
  throw Refused(reason, message);
}

std::string text(u64 value) { return std::to_string(value); }

void expect(bool holds, const char* reason, const std::string& what, u64 found, u64 wanted) {
  if (!holds) refuse(reason, what + " is " + text(found) + ", expected " + text(wanted));
}

void check_header(const u8* bytes, u64 length, const Expectation* expected, Frame& frame) {
  if (length < kHeaderBytes + kTrailerBytes)
    refuse("truncated", "the frame has " + text(length) + " bytes, the least is 72");
  if (std::memcmp(bytes, kMagic, sizeof kMagic) != 0)
    refuse("magic", "the frame does not start with 93 53 4D 32");
  frame.minor = bytes[5];
  frame.flags = load<u16>(bytes + 6);
  if (bytes[4] != kMajor || (frame.minor > kMinor && frame.flags != 0))
    refuse("version", "the frame has version " + text(bytes[4]) + "." + text(frame.minor) +
                          ", this reader knows 1.0; update the older side");
  if (frame.flags & ~(kFlagLossless | kFlagErrorFeedback))
    refuse("flags", "the frame sets unknown flags: " + text(frame.flags));
  const u64 stated = load<u64>(bytes + 8);
  expect(stated == length, "frame_length", "the stated frame length", stated, length);
  const u64 tensors = load<u32>(bytes + 16);
  if (expected != nullptr && tensors > expected->rows.size())
    refuse("tensor_count", "the frame has " + text(tensors) + " tensors, the manifest " +
                               text(expected->rows.size()));
  const u64 directory = load<u32>(bytes + 20);
  expect(directory == kEntryBytes * tensors, "directory_length", "the directory length",
         directory, kEntryBytes * tensors);
  const u64 room = length - kHeaderBytes - kTrailerBytes;
  if (directory > room)
    refuse("directory_length", "the directory has " + text(directory) +
                                   " bytes, the frame has room for " + text(room));
  if (header_hash(bytes, bytes + kHeaderBytes, directory) != load<u64>(bytes + 56))
    refuse("header_hash", "header and directory do not match their hash; send it again");
  if (load<u64>(bytes + 48) != 0) refuse("reserved", "reserved header bytes are not zero");
  frame.fingerprint = load<u64>(bytes + 32);
  frame.round = load<u64>(bytes + 40);
  if (expected == nullptr) return;
  expect(frame.fingerprint == expected->fingerprint, "fingerprint", "the manifest fingerprint",
         frame.fingerprint, expected->fingerprint);
  expect(frame.round == expected->round, "round", "the round", frame.round, expected->round);
}

bool known_codec(u8 codec, Dtype dtype) {
  switch (static_cast<Codec>(codec)) {
    case Codec::bf16: return dtype != Dtype::bf16;
    case Codec::f16: return dtype != Dtype::f16;
    case Codec::raw:
    case Codec::int8:
    case Codec::nf4:
    case Codec::int4: return true;
    default: return false;
  }
}

Entry read_entry(const u8* at, const std::string& name) {
  Entry entry{};
  entry.id = load<u32>(at);
  if (at[4] > static_cast<u8>(Dtype::bf16))
    refuse("dtype", name + " has unknown dtype code " + text(at[4]));
  entry.dtype = static_cast<Dtype>(at[4]);
  if (!known_codec(at[5], entry.dtype))
    refuse("codec", name + " has value codec " + text(at[5]) +
                        ", which is unknown, not supported, or not allowed for its dtype");
  entry.codec = static_cast<Codec>(at[5]);
  if (at[6] < kMinBlockLog2 || at[6] > kMaxBlockLog2)
    refuse("block_size", name + " has block size 2^" + text(at[6]) + ", allowed are 12 to 16");
  entry.block_log2 = at[6];
  const bool quant_ok = is_quantised(entry.codec)
                            ? at[7] >= kMinQuantLog2 && at[7] <= kMaxQuantLog2
                            : at[7] == 0;
  if (!quant_ok)
    refuse("quant_block", name + " has quantisation block code " + text(at[7]) +
                              ", allowed are 5 to 12 for int8, nf4 and int4, else 0");
  entry.quant_log2 = at[7];
  entry.numel = load<u64>(at + 8);
  entry.stored = load<u64>(at + 16);
  entry.body_bytes = load<u64>(at + 24);
  return entry;
}

void compare_with_manifest(Entry& entry, const Expectation& expected, std::size_t& row,
                           const std::string& name) {
  const std::vector<ManifestRow>& rows = expected.rows;
  while (row < rows.size() && rows[row].id < entry.id) ++row;
  if (row == rows.size() || rows[row].id != entry.id)
    refuse("unknown_id", name + " is not in the manifest");
  expect(entry.dtype == rows[row].dtype, "dtype", "the dtype code of " + name,
         static_cast<u64>(entry.dtype), static_cast<u64>(rows[row].dtype));
  expect(entry.numel == rows[row].numel, "numel", "the element count of " + name, entry.numel,
         rows[row].numel);
  entry.manifest_row = row++;
}

void read_directory(const u8* bytes, const Expectation* expected, Frame& frame) {
  const u64 tensors = load<u32>(bytes + 16);
  u64 offset = kHeaderBytes + kEntryBytes * tensors;
  u64 room = frame.length - offset - kTrailerBytes;
  u64 total = 0;
  bool lossless = true;
  std::size_t row = 0;
  frame.entries.reserve(tensors);
  for (u64 i = 0; i < tensors; ++i) {
    const u8* at = bytes + kHeaderBytes + kEntryBytes * i;
    const std::string name = "tensor " + text(load<u32>(at));
    if (i > 0 && load<u32>(at) <= frame.entries.back().id)
      refuse("id_order", name + " follows tensor " + text(frame.entries.back().id) +
                             "; ids must increase strictly");
    Entry entry = read_entry(at, name);
    if (expected != nullptr) compare_with_manifest(entry, *expected, row, name);
    if (entry.stored > entry.numel)
      refuse("nnz", name + " stores " + text(entry.stored) + " values of " +
                        text(entry.numel) + " elements");
    if (__builtin_add_overflow(total, entry.numel, &total))
      refuse("total_numel", "the element counts add up to more than 2^64");
    if (entry.body_bytes > room)
      refuse("body_length", name + " has a body of " + text(entry.body_bytes) +
                                " bytes where " + text(room) + " are left");
    entry.body_begin = offset;
    offset += entry.body_bytes;
    room -= entry.body_bytes;
    lossless = lossless && entry.codec == Codec::raw;
    frame.entries.push_back(entry);
  }
  expect(room == 0, "body_length", "the number of bytes behind the last body", room, 0);
  const u64 stated = load<u64>(bytes + 24);
  expect(total == stated, "total_numel", "the total element count", stated, total);
  if (frame.minor == kMinor && lossless != ((frame.flags & kFlagLossless) != 0))
    refuse("flags", "the lossless flag contradicts the codecs in the directory");
}

// Consumes parts of one body, front to back.
class Cursor {
 public:
  Cursor(const Entry& entry, const std::string& name)
      : at_(entry.body_begin), left_(entry.body_bytes), name_(name) {}

  u64 take(u64 bytes, const char* part) {
    if (bytes > left_)
      refuse("body_length", "the " + std::string(part) + " of " + name_ + " need " +
                                text(bytes) + " bytes where " + text(left_) + " are left");
    const u64 begin = at_;
    at_ += bytes;
    left_ -= bytes;
    return begin;
  }
  u64 at() const { return at_; }
  u64 left() const { return left_; }

 private:
  u64 at_;
  u64 left_;
  const std::string& name_;
};

void check_descriptor(const BlockIndex& block, u64 mode, u64 spare, const std::string& name) {
  if (mode < 1 || mode >= static_cast<u64>(kModes))
    refuse("mode", name + " has a block of unknown mode " + text(mode));
  if (spare != 0) refuse("descriptor_reserved", name + " has reserved descriptor bits set");
  const bool rice = block.mode == Mode::gaps || block.mode == Mode::clear_gaps;
  const bool spans = block.mode == Mode::spans;
  if ((block.k0 != 0 && !rice && !spans) || (block.k1 != 0 && !spans))
    refuse("rice_parameter", name + " has a Rice parameter where its mode uses none");
  const bool dense = block.mode == Mode::dense;
  if (dense ? block.stored != block.elements : block.stored >= block.elements)
    refuse("block_count", name + " has a block that stores " + text(block.stored) + " of " +
                              text(block.elements) + " elements; dense blocks store all, " +
                              "others fewer");
  const u32 bitmap = (block.elements + 7) / 8;
  const bool length_ok = dense                         ? block.index_bytes == 0
                         : block.mode == Mode::bitmap ? block.index_bytes == bitmap
                                                      : block.index_bytes <= bitmap;
  if (!length_ok)
    refuse("index_length", name + " has an index stream of " + text(block.index_bytes) +
                               " bytes in a block whose bitmap has " + text(bitmap));
}

void check_layout(const Frame& frame, Entry& entry) {
  const std::string name = "tensor " + text(entry.id);
  Cursor cursor(entry, name);
  const u64 blocks = entry.blocks();
  const u64 presence_bytes = pieces(blocks, 3);
  const u64 presence = cursor.take(presence_bytes, "presence bits");
  if ((blocks & 7) != 0 &&
      frame.bytes[presence + presence_bytes - 1] >> (blocks & 7) != 0)
    refuse("presence_padding", name + " has spare presence bits set");
  u64 present = 0;
  for (u64 i = 0; i < presence_bytes; ++i)
    present += static_cast<u64>(__builtin_popcount(frame.bytes[presence + i]));
  entry.descriptors = cursor.take(kDescriptorBytes * present, "block descriptors");
  entry.modes[0] = blocks - present;

  u64 stored = 0;
  u64 nth = 0;
  for (u64 b = 0; b < blocks; ++b) {
    if (!frame.present(entry, b)) continue;
    const u8* at = frame.bytes + entry.descriptors + kDescriptorBytes * nth;
    const BlockIndex block = frame.descriptor(entry, nth++, b);
    check_descriptor(block, at[0], load<u16>(at + 6), name);
    entry.modes[at[0]] += 1;
    stored += block.stored;
    entry.index_bytes += block.index_bytes;
  }
  expect(stored == entry.stored, "nnz_sum", "the sum of block counts of " + name, stored,
         entry.stored);
  entry.index = cursor.take(entry.index_bytes, "index streams");
  const u64 padding = (0 - cursor.at()) & (kValueAlignment - 1);
  const u64 pad = cursor.take(padding, "padding bytes");
  for (u64 i = 0; i < padding; ++i)
    if (frame.bytes[pad + i] != 0) refuse("padding", name + " has padding that is not zero");
  // `stored` was paid for by descriptors, at most 2^16 values each, so this cannot overflow.
  entry.values = cursor.take(value_plane_bytes(stored, entry.codec, entry.dtype), "values");
  entry.scales = cursor.take(scale_plane_bytes(stored, entry.codec, entry.quant_log2), "scales");
  expect(cursor.left() == 0, "body_length", "the number of bytes behind the values of " + name,
         cursor.left(), 0);
}

}  // namespace

ValuePlane Frame::plane(const Entry& entry) const {
  return {entry.codec,  entry.dtype,          entry.quant_log2,
          entry.stored, bytes + entry.values, bytes + entry.scales};
}

BlockIndex Frame::descriptor(const Entry& entry, u64 nth_present, u64 block) const {
  const u8* at = bytes + entry.descriptors + kDescriptorBytes * nth_present;
  return {static_cast<Mode>(at[0]),    static_cast<u8>(at[1] & 15),
          static_cast<u8>(at[1] >> 4), entry.block_elements(block),
          u32{load<u16>(at + 2)} + 1,  load<u16>(at + 4)};
}

void compare_body_hash(const Frame& frame) {
  const u64 begin = frame.bodies();
  const u64 end = frame.bodies_end();
  if (xxh3(frame.bytes + begin, end - begin) != load<u64>(frame.bytes + end))
    refuse("body_hash", "the bodies do not match their hash; send the frame again");
}

Frame parse(const u8* bytes, u64 length, const Expectation* expected, BodyHash body_hash) {
  Frame frame{};
  frame.bytes = bytes;
  frame.length = length;
  check_header(bytes, length, expected, frame);
  read_directory(bytes, expected, frame);
  if (body_hash == BodyHash::now) compare_body_hash(frame);
  try {
    for (Entry& entry : frame.entries) check_layout(frame, entry);
  } catch (const Refused&) {
    // A damaged body is named as such, whatever layout the damage makes of it.
    if (body_hash == BodyHash::later) compare_body_hash(frame);
    throw;
  }
  return frame;
}

}  // namespace rle
