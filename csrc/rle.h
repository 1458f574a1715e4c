// The packing codec: tensors -> frame bytes -> tensors or a weighted sum.
//
// C++17 without Python and without global state but the choice of the instruction set.
// The format is docs/wire_format.md.
#pragma once

#include <memory>
#include <vector>

#include "isa.h"

namespace rle {

struct SourceTensor {
  u32 id;
  Dtype dtype;
  u64 numel;
  const void* data;  // contiguous, aligned to the dtype
};

struct PackOptions {
  Codec codec = Codec::raw;
  int block_log2 = kMaxBlockLog2;
  int quant_log2 = 0;  // 0 unless the codec is quantised
  bool stochastic = false;
  u64 seed = 0;
  u64 round = 0;
  u64 fingerprint = 0;
  bool error_feedback = false;
};

// Plans all index planes at once, so the frame's size is known before a byte is written.
class FrameWriter {
 public:
  // `tensors` have strictly increasing ids and outlive the writer.
  FrameWriter(const std::vector<SourceTensor>& tensors, const PackOptions& options);

  u64 size() const { return size_; }

  // Writes size() bytes. Throws std::invalid_argument if a lossy codec meets a value it
  // cannot code as a finite number, or if the tensors no longer store as many values as
  // were planned; nothing behind size() bytes changes.
  void write(u8* out) const;

 private:
  struct Body {
    Coding coding;
    u64 stored = 0;
    u64 begin = 0;
    u64 bytes = 0;
    std::vector<u8> presence;
    std::vector<BlockIndex> blocks;  // present ones
    std::vector<u8> index;
    std::vector<u8> kept;  // values of the blocks that keeps_values() names, packed
  };

  bool keeps_values(const BlockIndex& block) const;

  // `packed` has room for the values of one block and what `gather_under` overruns.
  Body plan(const SourceTensor& tensor, Scratch& scratch, u8* packed) const;
  void write_header(u8* out) const;
  // Everything before the value plane; returns where the plane begins.
  u8* write_index(const Body& body, u8* out) const;
  void write_values(const SourceTensor& tensor, const Body& body, u8* values,
                    const u8* body_end, const u8* frame_end, HashState& hash) const;

  const std::vector<SourceTensor>& tensors_;
  PackOptions options_;
  std::vector<Body> bodies_;
  u64 size_ = 0;
};

struct ManifestRow {
  u32 id;
  Dtype dtype;
  u64 numel;
};

// What the receiver knows; nothing of it comes from the frame.
struct Expectation {
  std::vector<ManifestRow> rows;  // strictly increasing ids
  u64 fingerprint;
  u64 round;
};

// One tensor of a frame. Offsets count from the start of the frame.
struct Entry {
  u32 id;
  Dtype dtype;
  Codec codec;
  int block_log2;
  int quant_log2;
  u64 numel;
  u64 stored;
  u64 body_begin;
  u64 body_bytes;
  u64 descriptors;
  u64 index;
  u64 values;
  u64 scales;
  u64 index_bytes;
  u64 modes[kModes];
  std::size_t manifest_row;  // only with an Expectation

  u64 blocks() const { return pieces(numel, block_log2); }
  u32 block_elements(u64 block) const { return rle::block_elements(numel, block, block_log2); }
};

struct Frame {
  const u8* bytes;
  u64 length;
  u8 minor;
  u16 flags;
  u64 fingerprint;
  u64 round;
  std::vector<Entry> entries;

  u64 bodies() const { return kHeaderBytes + kEntryBytes * entries.size(); }
  u64 bodies_end() const { return length - kTrailerBytes; }
  ValuePlane plane(const Entry& entry) const;
  BlockIndex descriptor(const Entry& entry, u64 nth_present, u64 block) const;
  bool present(const Entry& entry, u64 block) const {
    return bytes[entry.body_begin + (block >> 3)] >> (block & 7) & 1;
  }
};

// Whether the hash of the bodies is compared while parsing or by a later step. A layout is
// refused only after the hash, so the reason is the same.
enum class BodyHash { now, later };

// Checks header, directory, hashes and the layout of every body; throws Refused.
// `bytes` are aligned to 4 bytes. `expected` may be null: then ids, dtypes, sizes, round
// and fingerprint are not compared. Allocates 200 bytes a tensor of the frame.
Frame parse(const u8* bytes, u64 length, const Expectation* expected,
            BodyHash body_hash = BodyHash::now);

// Throws Refused if the bodies do not match their hash.
void compare_body_hash(const Frame& frame);

// Working memory of one thread, some 0.7 MB whatever the frame.
struct Workspace;
std::shared_ptr<Workspace> make_workspace();

// Decodes every index stream and checks every value of one entry; throws Refused.
void validate(const Frame& frame, const Entry& entry, bool allow_nonfinite, Workspace& work);

// Writes entry.numel elements of the source dtype. Cannot fail after validate.
void decode(const Frame& frame, const Entry& entry, void* out, Workspace& work);

// Checks and decodes a frame that was parsed with BodyHash::later, in one pass over it, one
// output for each of its entries. Throws Refused as compare_body_hash and then validate
// would; the outputs are then undefined.
void check_and_decode(const Frame& frame, bool allow_nonfinite,
                      const std::vector<void*>& outputs, Workspace& work);

struct Addend {
  const Frame* frame;
  const Entry* entry;
  float weight;
};

// out[i] += weight * value[i] at every stored position, one float32 multiplication and one
// float32 addition each, addend after addend: block by block, so that the sums stay in the
// cache. All addends are of one tensor. Cannot fail after validate.
void accumulate(const std::vector<Addend>& addends, float* out, Workspace& work);

// Sum of squares of the decoded values, in float64. Cannot fail after validate.
double squared_norm(const Frame& frame, const Entry& entry, Workspace& work);

u64 xxh3(const u8* bytes, u64 length);
u64 header_hash(const u8* header, const u8* directory, u64 directory_bytes);

// Throws Refused with the message of a fault.
[[noreturn]] void refuse(const Fault& fault);

}  // namespace rle
