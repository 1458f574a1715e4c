// The value plane: stored values <-> codes and scales.
#pragma once

#include <vector>

#include "numbers.h"

namespace rle {

// Absmax below this makes a block of zeros: 1/scale must stay finite.
constexpr float kSmallestAbsmax = 1e-30f;

inline int quant_levels(Codec codec) { return codec == Codec::int8 ? 127 : 7; }

// Writes the value plane and scales of one tensor, in index order, in pieces of any size.
class ValueEncoder {
 public:
  struct Options {
    Codec codec;
    Dtype dtype;
    int quant_log2;
    bool stochastic;
    CounterRng rng;
  };

  ValueEncoder(const Options& options, u8* values, u8* scales);

  // `elements` are positions within the tensor; read only for stochastic rounding.
  // Throws std::invalid_argument if a value cannot be coded as a finite number.
  void push(const float* values, const u64* elements, u32 count);
  void finish();

 private:
  void push_half(const float* values, const u64* elements, u32 count);
  void flush();

  Options options_;
  u8* values_;
  u8* scales_;
  u32 pending_ = 0;
  std::vector<float> block_;
  std::vector<u64> block_elements_;
};

// A validated or to-be-validated value plane inside a frame.
struct ValuePlane {
  Codec codec;
  Dtype dtype;
  int quant_log2;
  u64 stored;
  const u8* values;
  const u8* scales;
};

// Throws Refused on codes or scales that no encoder writes, and on non-finite values.
// Raw planes are checked block by block with check_raw_block instead.
void check_values(const ValuePlane& plane, bool allow_nonfinite);
void check_raw_block(const ValuePlane& plane, u64 start, u32 count, bool dense,
                     bool allow_nonfinite);

// Values [start, start + count) as float32, rounded to the source dtype.
void decode_values(const ValuePlane& plane, u64 start, u32 count, float* out);

}  // namespace rle
