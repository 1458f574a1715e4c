#include "rle.h"

#include <algorithm>

namespace rle {

struct Workspace {
  Scratch scratch;
  float floats[kMaxBlock];  // of a block
  alignas(64) u8 bits[4 * kPiece];
};
static_assert(sizeof(Workspace) <= 700'000, "what rle.h and docs/wire_format.md promise");

std::shared_ptr<Workspace> make_workspace() {
  return std::shared_ptr<Workspace>(new Workspace);  // not zeroed: pages cost only when used
}

namespace {

// Up to this share of set elements, places are quicker to add to than masks.
constexpr u32 kSparseShare = 16;

bool aligned(const void* at) { return (reinterpret_cast<std::uintptr_t>(at) & 63) == 0; }

// A walk over the present blocks of one entry.
class BlockWalk {
 public:
  BlockWalk(const Frame& frame, const Entry& entry)
      : frame_(&frame), entry_(&entry), index_(entry.index) {}

  bool present(u64 block) const { return frame_->present(*entry_, block); }
  // Of the next present block, which is number `block`.
  BlockIndex descriptor(u64 block) const { return frame_->descriptor(*entry_, nth_, block); }
  const u8* stream() const { return frame_->bytes + index_; }
  u64 first_value() const { return value_; }
  void advance(const BlockIndex& block) {
    nth_ += 1;
    index_ += block.index_bytes;
    value_ += block.stored;
  }

 private:
  const Frame* frame_;
  const Entry* entry_;
  u64 nth_ = 0;
  u64 index_;
  u64 value_ = 0;
};

// visit(block number, descriptor, its index stream, number of its first value)
template <class Visit>
void for_each_present(const Frame& frame, const Entry& entry, Visit visit) {
  BlockWalk walk(frame, entry);
  for (u64 b = 0; b < entry.blocks(); ++b) {
    if (!walk.present(b)) continue;
    const BlockIndex block = walk.descriptor(b);
    visit(b, block, walk.stream(), walk.first_value());
    walk.advance(block);
  }
}

void set_masks(const BlockIndex& block, const u8* stream, Scratch& scratch) {
  const Fault fault = isa().decode_index(block, stream, scratch.masks);
  if (fault.reason != nullptr) refuse(fault);
}

// Walks the pieces of a block: visit(first element, elements, number of its values).
template <class Visit>
void for_each_piece(const BlockIndex& block, const Scratch& scratch, Visit visit) {
  for (u32 begin = 0; begin < block.elements; begin += kPiece) {
    const u32 count = std::min(kPiece, block.elements - begin);
    u32 stored = count;
    if (block.mode != Mode::dense)
      stored = isa().count_bits(scratch.masks + begin / 64, (count + 63) / 64);
    visit(begin, count, stored);
  }
}

class RawCheck {
 public:
  explicit RawCheck(bool allow_nonfinite) : allow_nonfinite_(allow_nonfinite) {}

  void see(const u8* values, Dtype dtype, u32 count) {
    const RawSurvey seen = isa().survey_raw(values, dtype, count);
    seen_.nonfinite |= seen.nonfinite;
    seen_.any_set |= seen.any_set;
    seen_.zeros += seen.zeros;
  }

  void finish(bool dense) const {
    if (seen_.nonfinite && !allow_nonfinite_) refuse({"nonfinite"});
    if (dense && !seen_.any_set) refuse({"empty_block"});
    if (!dense && seen_.zeros != 0) refuse({"zero_value", seen_.zeros});
  }

 private:
  bool allow_nonfinite_;
  RawSurvey seen_;
};

void check_lossy(const ValuePlane& plane, bool allow_nonfinite) {
  const Fault fault = isa().check_values(plane, allow_nonfinite);
  if (fault.reason != nullptr) refuse(fault);
}

// Writes the elements of one tensor front to back, zeros where nothing is stored.
class Output {
 public:
  Output(const Entry& entry, void* out)
      : width_(dtype_bytes(entry.dtype)),
        numel_(entry.numel),
        out_(static_cast<u8*>(out)),
        stream_(entry.numel * width_ >= kStreamBytes && aligned(out)) {}

  // `begin` is where the values belong; `masks` is null if every element has one.
  void put(u64 begin, u32 count, const u64* masks, const u8* values, u32 stored) {
    zeros_to(begin);
    u8* at = out_ + begin * width_;
    if (masks == nullptr)
      isa().copy(at, values, count * width_, stream_);
    else if (stored == 0)
      isa().zero(at, count * width_, stream_);
    else
      isa().expand(masks, count, width_, values, stored, stream_, at);
    written_ = begin + count;
  }

  void finish() {
    zeros_to(numel_);
    if (stream_) isa().fence();
  }

 private:
  void zeros_to(u64 end) {
    isa().zero(out_ + written_ * width_, (end - written_) * width_, stream_);
    written_ = end;
  }

  u64 width_;
  u64 numel_;
  u8* out_;
  bool stream_;
  u64 written_ = 0;
};

const u64* piece_masks(const BlockIndex& block, const Scratch& scratch, u32 begin) {
  return block.mode == Mode::dense ? nullptr : scratch.masks + begin / 64;
}

// Decodes one entry. Of raw values, on_raw(values, count) sees every piece before it is
// moved, and on_block(dense) follows the pieces of each block.
template <class OnRaw, class OnBlock>
void decode_entry(const Frame& frame, const Entry& entry, void* out, Workspace& work,
                  OnRaw on_raw, OnBlock on_block) {
  if (entry.numel == 0) return;
  const ValuePlane plane = frame.plane(entry);
  const bool raw = plane.codec == Codec::raw;
  const u64 width = dtype_bytes(plane.dtype);
  Output output(entry, out);
  for_each_present(frame, entry, [&](u64 b, const BlockIndex& block, const u8* stream,
                                     u64 value) {
    const bool dense = block.mode == Mode::dense;
    if (!dense) set_masks(block, stream, work.scratch);
    const u64 base = b << entry.block_log2;
    for_each_piece(block, work.scratch, [&](u32 begin, u32 count, u32 stored) {
      const u8* values = plane.values + width * value;
      if (raw) {
        on_raw(values, stored);
      } else {
        isa().decode_values(plane, value, stored, work.floats);
        isa().narrow(work.floats, plane.dtype, stored, work.bits);
        values = work.bits;
      }
      output.put(base + begin, count, piece_masks(block, work.scratch, begin), values, stored);
      value += stored;
    });
    if (raw) on_block(dense);
  });
  output.finish();
}

// False if the hash of the bodies is another.
bool decode_while_checking(const Frame& frame, bool allow_nonfinite,
                           const std::vector<void*>& outputs, Workspace& work) {
  HashState hash;
  isa().hash_reset(hash);
  for (std::size_t i = 0; i < frame.entries.size(); ++i) {
    const Entry& entry = frame.entries[i];
    const ValuePlane plane = frame.plane(entry);
    const bool raw = plane.codec == Codec::raw;
    const u64 hashed = raw ? entry.values - entry.body_begin : entry.body_bytes;
    isa().hash_update(hash, frame.bytes + entry.body_begin, hashed);
    if (!raw) check_lossy(plane, allow_nonfinite);
    RawCheck check(allow_nonfinite);
    decode_entry(
        frame, entry, outputs[i], work,
        [&](const u8* values, u32 count) {
          check.see(values, plane.dtype, count);
          isa().hash_update(hash, values, count * dtype_bytes(plane.dtype));
        },
        [&](bool dense) {
          check.finish(dense);
          check = RawCheck(allow_nonfinite);
        });
  }
  return isa().hash_digest(hash) == load<u64>(frame.bytes + frame.bodies_end());
}

}  // namespace

void validate(const Frame& frame, const Entry& entry, bool allow_nonfinite, Workspace& work) {
  const ValuePlane plane = frame.plane(entry);
  const bool raw = plane.codec == Codec::raw;
  for_each_present(frame, entry, [&](u64, const BlockIndex& block, const u8* stream,
                                     u64 value) {
    const bool dense = block.mode == Mode::dense;
    if (!dense) set_masks(block, stream, work.scratch);
    if (!raw) return;
    RawCheck check(allow_nonfinite);
    check.see(plane.values + dtype_bytes(plane.dtype) * value, plane.dtype, block.stored);
    check.finish(dense);
  });
  if (!raw) check_lossy(plane, allow_nonfinite);
}

void decode(const Frame& frame, const Entry& entry, void* out, Workspace& work) {
  decode_entry(frame, entry, out, work, [](const u8*, u32) {}, [](bool) {});
}

void check_and_decode(const Frame& frame, bool allow_nonfinite,
                      const std::vector<void*>& outputs, Workspace& work) {
  try {
    if (!decode_while_checking(frame, allow_nonfinite, outputs, work)) compare_body_hash(frame);
  } catch (const Refused&) {
    // Which fault is named depends on the order of the checks; the documented order is
    // that of the separate steps.
    compare_body_hash(frame);
    for (const Entry& entry : frame.entries) validate(frame, entry, allow_nonfinite, work);
    throw;
  }
}

void accumulate(const std::vector<Addend>& addends, float* out, Workspace& work) {
  if (addends.empty()) return;
  std::vector<BlockWalk> walks;
  for (const Addend& addend : addends) walks.emplace_back(*addend.frame, *addend.entry);
  // Frames may use different block sizes: go by the largest, which all others divide.
  const u64 numel = addends.front().entry->numel;
  const u64 steps = pieces(numel, kMaxBlockLog2);
  for (u64 step = 0; step < steps; ++step) {
    for (std::size_t a = 0; a < addends.size(); ++a) {
      const Entry& entry = *addends[a].entry;
      const ValuePlane plane = addends[a].frame->plane(entry);
      const bool direct = plane.codec == Codec::raw && plane.dtype == Dtype::f32;
      const int finer = kMaxBlockLog2 - entry.block_log2;
      const u64 end = std::min<u64>((step + 1) << finer, entry.blocks());
      for (u64 b = step << finer; b < end; ++b) {
        if (!walks[a].present(b)) continue;
        const BlockIndex block = walks[a].descriptor(b);
        const float* values = reinterpret_cast<const float*>(plane.values) +
                              (direct ? walks[a].first_value() : 0);
        if (!direct) {
          isa().decode_values(plane, walks[a].first_value(), block.stored, work.floats);
          values = work.floats;
        }
        float* to = out + (b << entry.block_log2);
        const float weight = addends[a].weight;
        if (block.mode == Mode::dense) {
          isa().add_dense(values, block.stored, weight, to);
        } else if (block.mode == Mode::gaps && block.stored <= block.elements / kSparseShare) {
          isa().add_gaps(block, walks[a].stream(), values, weight, work.scratch, to);
        } else {
          set_masks(block, walks[a].stream(), work.scratch);
          isa().add(work.scratch.masks, block.elements, values, block.stored, weight, to);
        }
        walks[a].advance(block);
      }
    }
  }
}

double squared_norm(const Frame& frame, const Entry& entry, Workspace& work) {
  const ValuePlane plane = frame.plane(entry);
  double sum = 0;
  for (u64 start = 0; start < plane.stored; start += kPiece) {
    const u32 count = static_cast<u32>(std::min<u64>(kPiece, plane.stored - start));
    isa().decode_values(plane, start, count, work.floats);
    sum += isa().sum_of_squares(work.floats, count);
  }
  return sum;
}

}  // namespace rle
