// The block codec as a table of functions, compiled once for every instruction set.
//
// All tables give the same bytes. Functions work on one block or one piece of the value
// plane, never allocate and never throw: what they refuse comes back as a Fault.
#pragma once

#include "format.h"

namespace rle {

// Why bytes are refused: a slug of docs/wire_format.md and the numbers of its message.
struct Fault {
  const char* reason = nullptr;
  u64 found = 0;
  u64 limit = 0;
};

// What an 8-byte block descriptor says, plus the block's element count.
struct BlockIndex {
  Mode mode;
  u8 k0;
  u8 k1;
  u32 elements;
  u32 stored;  // values in the value plane; equals `elements` in a dense block
  u32 index_bytes;
};

// Values are checked, coded, hashed and moved in pieces that stay in the first cache.
constexpr u32 kPiece = 1024;
static_assert(kPiece <= 1u << kMinBlockLog2, "a block is a whole number of pieces");
// Larger outputs pass by the caches.
constexpr u64 kStreamBytes = u64{4} << 20;

constexpr u32 kMaskWords = kMaxBlock / 64;
constexpr u32 kMaxIndexBytes = kMaxBlock / 8;
constexpr u32 kIndexSlack = 32;  // bytes a writer may store behind a stream

// Working memory of one thread.
struct Scratch {
  u64 masks[kMaskWords];
  u64 other_masks[kMaskWords];
  u16 positions[kMaxBlock + 64];
  u16 gaps[kMaxBlock + 64];
  u16 zero_spans[kMaxBlock / 2 + 64];
  u16 spans[kMaxBlock / 2 + 64];
  u8 index[kMaxIndexBytes + kIndexSlack];
};

// How stored values become codes.
struct Coding {
  Codec codec;
  Dtype dtype;
  int quant_log2;
};

struct Rounding {
  bool stochastic;
  u64 key;              // of CounterRng
  const u64* elements;  // places within the tensor; only read for stochastic rounding
};

// A value plane inside a frame.
struct ValuePlane {
  Codec codec;
  Dtype dtype;
  int quant_log2;
  u64 stored;
  const u8* values;
  const u8* scales;
};

// What stands among raw values.
struct RawSurvey {
  bool nonfinite = false;
  bool any_set = false;
  u32 zeros = 0;
};

// A running xxh3-64.
struct HashState {
  alignas(64) u8 bytes[640];
};

struct Isa {
  const char* name;

  // --- writing ---
  // Bit i of the masks says that element i has a bit set. Returns how many have.
  u32 (*masks)(const void* elements, u64 width, u32 count, u64* masks);
  // Chooses the cheapest mode by exact cost and writes its stream to scratch.index.
  // `set` bits stand in scratch.masks, at least one; value_cost is that of one stored
  // value in 1/4096 bit, scales included.
  BlockIndex (*encode_index)(Scratch& scratch, u32 elements, u32 set, u64 value_cost);
  // Copies the elements that have a bit set, packed; may write 64 bytes more than that.
  u32 (*gather)(const void* elements, u64 width, u32 count, u8* out);
  // The same where the masks are known, fast if few bits are set.
  u32 (*gather_under)(const u64* masks, const void* elements, u64 width, u32 count, u8* out);
  // Source bits to float32.
  void (*widen)(const void* bits, Dtype dtype, u32 count, float* out);
  // `count` is a multiple of the quantisation block but for the last piece of a plane.
  // False if a value cannot be coded as a finite number.
  bool (*encode_values)(const Coding& coding, const Rounding& rounding, const float* values,
                        u32 count, u8* codes, u8* scales);

  // --- reading ---
  // Decodes the stream of a block that is not dense.
  Fault (*decode_index)(const BlockIndex& block, const u8* stream, u64* masks);
  // Codes and scales that no writer makes, and non-finite values.
  Fault (*check_values)(const ValuePlane& plane, bool allow_nonfinite);
  RawSurvey (*survey_raw)(const u8* values, Dtype dtype, u32 count);
  // Values [start, start + count) as float32, rounded to the source dtype.
  void (*decode_values)(const ValuePlane& plane, u64 start, u32 count, float* out);
  // float32 to source bits; exact for what decode_values gives.
  void (*narrow)(const float* values, Dtype dtype, u32 count, void* bits);
  // Writes all `count` elements: the next value where a mask bit is set, else zero.
  // `stream` passes by the caches; `out` is then aligned to 64 bytes, and a fence must
  // follow.
  void (*expand)(const u64* masks, u32 count, u64 width, const u8* values, u32 stored,
                 bool stream, u8* out);
  // out += weight * value where a mask bit is set; one rounding for each operation.
  void (*add)(const u64* masks, u32 count, const float* values, u32 stored, float weight,
              float* out);
  // The same for a block in Rice gaps, straight from its stream; it was decoded before.
  void (*add_gaps)(const BlockIndex& block, const u8* stream, const float* values,
                   float weight, Scratch& scratch, float* out);
  void (*add_dense)(const float* values, u32 count, float weight, float* out);
  double (*sum_of_squares)(const float* values, u32 count);

  // Set bits in `words` masks.
  u32 (*count_bits)(const u64* masks, u32 words);

  // --- bytes ---
  void (*copy)(u8* out, const u8* from, u64 bytes, bool stream);
  void (*zero)(u8* out, u64 bytes, bool stream);
  void (*fence)();  // after the last streamed store
  void (*hash_reset)(HashState& state);
  void (*hash_update)(HashState& state, const u8* bytes, u64 count);
  u64 (*hash_digest)(const HashState& state);
};

// The best table that the machine and SAMV2_ISA (scalar, avx2, avx512) allow. Throws
// std::invalid_argument if SAMV2_ISA names another one.
const Isa& isa();

}  // namespace rle
