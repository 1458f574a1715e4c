#include "values.h"

#include <algorithm>
#include <cmath>

namespace rle {

namespace {

constexpr u32 kChunk = 4096;

[[noreturn]] void cannot_code(const char* codec) {
  throw std::invalid_argument(std::string("a value is not finite, or is not after rounding to ") +
                              codec + "; clip the update, or pack it with codec 'raw'");
}

const char* codec_name(Codec codec) {
  switch (codec) {
    case Codec::bf16: return "bf16";
    case Codec::f16: return "f16";
    case Codec::int8: return "int8";
    default: return "int4";
  }
}

u32 largest_magnitude(const float* values, u32 count) {
  u32 largest = 0;
  for (u32 i = 0; i < count; ++i) largest = std::max(largest, bits_of(values[i]) & 0x7FFFFFFFu);
  return largest;
}

// Exact for |value| < 2^22: the addition rounds to the nearest even integer.
inline float nearest(float value) { return (value + 12582912.0f) - 12582912.0f; }

// The largest step whose highest level is still finite in float32.
float step_of(float absmax, int levels) {
  if (absmax < kSmallestAbsmax) return 0.0f;
  float step = absmax / static_cast<float>(levels);
  if (!std::isfinite(step * static_cast<float>(levels))) step = std::nextafter(step, 0.0f);
  return step;
}

int code_at(const ValuePlane& plane, u64 index) {
  if (plane.codec == Codec::int8) return static_cast<std::int8_t>(plane.values[index]);
  const int nibble = plane.values[index >> 1] >> (4 * (index & 1)) & 15;
  return nibble - ((nibble & 8) << 1);
}

void decode_quantised(const ValuePlane& plane, u64 start, u32 count, float* out) {
  for (u32 done = 0; done < count;) {
    const u64 index = start + done;
    const u64 block = index >> plane.quant_log2;
    const u64 block_end = (block + 1) << plane.quant_log2;
    const u32 take = static_cast<u32>(std::min<u64>(count - done, block_end - index));
    const float scale = load<float>(plane.scales + 4 * block);
    if (plane.codec == Codec::int8) {
      const u8* codes = plane.values + index;
      for (u32 i = 0; i < take; ++i)
        out[done + i] = static_cast<float>(static_cast<std::int8_t>(codes[i])) * scale;
    } else {
      for (u32 i = 0; i < take; ++i)
        out[done + i] = static_cast<float>(code_at(plane, index + i)) * scale;
    }
    done += take;
  }
}

}  // namespace

ValueEncoder::ValueEncoder(const Options& options, u8* values, u8* scales)
    : options_(options), values_(values), scales_(scales) {
  if (!is_quantised(options.codec)) return;
  block_.resize(std::size_t{1} << options.quant_log2);
  block_elements_.resize(block_.size());
}

void ValueEncoder::push(const float* values, const u64* elements, u32 count) {
  if (!is_quantised(options_.codec)) return push_half(values, elements, count);
  const u32 capacity = static_cast<u32>(block_.size());
  for (u32 done = 0; done < count;) {
    const u32 take = std::min(count - done, capacity - pending_);
    std::copy_n(values + done, take, block_.data() + pending_);
    if (options_.stochastic)
      std::copy_n(elements + done, take, block_elements_.data() + pending_);
    pending_ += take;
    done += take;
    if (pending_ == capacity) flush();
  }
}

void ValueEncoder::finish() {
  if (pending_ > 0) flush();
}

void ValueEncoder::push_half(const float* values, const u64* elements, u32 count) {
  const bool bf16 = options_.codec == Codec::bf16;
  bool bad = false;
  for (u32 i = 0; i < count; ++i) {
    u16 code;
    if (options_.stochastic) {
      const u64 random = options_.rng.at(elements[i]);
      code = bf16 ? to_bf16_stochastic(values[i], random) : to_f16_stochastic(values[i], random);
    } else {
      code = bf16 ? to_bf16(values[i]) : to_f16(values[i]);
    }
    const float decoded = bf16 ? from_bf16(code) : from_f16(code);
    bad |= !finite_bits(bits_of(values[i]));
    bad |= !finite_bits(bits_of(through_source(decoded, options_.dtype)));
    store(values_, code);
    values_ += 2;
  }
  if (bad) cannot_code(codec_name(options_.codec));
}

void ValueEncoder::flush() {
  const u32 magnitude = largest_magnitude(block_.data(), pending_);
  if (!finite_bits(magnitude)) cannot_code(codec_name(options_.codec));
  const int levels = quant_levels(options_.codec);
  const float scale = step_of(float_of(magnitude), levels);
  store(scales_, scale);
  scales_ += 4;

  std::int8_t codes[kMaxQuantBlock];
  if (scale == 0.0f) {
    std::fill_n(codes, pending_, std::int8_t{0});
  } else if (options_.stochastic) {
    for (u32 i = 0; i < pending_; ++i) {
      const double uniform =
          static_cast<double>(options_.rng.at(block_elements_[i]) >> 11) * 0x1p-53;
      const double level = std::floor(static_cast<double>(block_[i]) / scale + uniform);
      codes[i] = static_cast<std::int8_t>(
          std::clamp(level, static_cast<double>(-levels), static_cast<double>(levels)));
    }
  } else {
    const float most = static_cast<float>(levels);
    for (u32 i = 0; i < pending_; ++i) {
      const float level = nearest(block_[i] / scale);
      codes[i] = static_cast<std::int8_t>(std::max(-most, std::min(most, level)));
    }
  }

  if (options_.codec == Codec::int8) {
    std::memcpy(values_, codes, pending_);
    values_ += pending_;
  } else {
    // A quantisation block has an even size, so each one starts in a fresh byte.
    if (pending_ & 1) codes[pending_] = 0;
    for (u32 i = 0; i < pending_; i += 2)
      *values_++ = static_cast<u8>((codes[i] & 15) | (codes[i + 1] & 15) << 4);
  }
  pending_ = 0;
}

void decode_values(const ValuePlane& plane, u64 start, u32 count, float* out) {
  if (is_quantised(plane.codec)) {
    decode_quantised(plane, start, count, out);
  } else if (plane.codec == Codec::raw && plane.dtype == Dtype::f32) {
    std::memcpy(out, plane.values + 4 * start, std::size_t{4} * count);
    return;
  } else {
    const bool bf16 = plane.codec == Codec::bf16 ||
                      (plane.codec == Codec::raw && plane.dtype == Dtype::bf16);
    const u8* codes = plane.values + 2 * start;
    if (bf16)
      for (u32 i = 0; i < count; ++i) out[i] = from_bf16(load<u16>(codes + 2 * i));
    else
      for (u32 i = 0; i < count; ++i) out[i] = from_f16(load<u16>(codes + 2 * i));
  }
  if (plane.codec != Codec::raw && plane.dtype != Dtype::f32)
    for (u32 i = 0; i < count; ++i) out[i] = through_source(out[i], plane.dtype);
}

namespace {

[[noreturn]] void nonfinite() {
  throw Refused("nonfinite", "a value is NaN or infinite; only finite values are accepted");
}

void check_scales(const ValuePlane& plane) {
  const float most = static_cast<float>(quant_levels(plane.codec));
  const u64 count = pieces(plane.stored, plane.quant_log2);
  for (u64 i = 0; i < count; ++i) {
    const u32 bits = load<u32>(plane.scales + 4 * i);
    const float highest = through_source(float_of(bits) * most, plane.dtype);
    if (bits >= kF32Infinity || !finite_bits(bits_of(highest)))
      throw Refused("scale", "scale " + std::to_string(i) +
                                 " is negative, or its highest level is not finite");
  }
}

void check_codes(const ValuePlane& plane) {
  const int lowest_code = -quant_levels(plane.codec);
  for (u64 begin = 0; begin < plane.stored;) {
    const u64 block = begin >> plane.quant_log2;
    const u64 end = std::min<u64>(plane.stored, (block + 1) << plane.quant_log2);
    int least = 0;
    int any = 0;
    for (u64 i = begin; i < end; ++i) {
      const int code = code_at(plane, i);
      least = std::min(least, code);
      any |= code;
    }
    if (least < lowest_code)
      throw Refused("code", "a quantised code is " + std::to_string(least) + ", the least is " +
                                std::to_string(lowest_code));
    if (any != 0 && load<float>(plane.scales + 4 * block) == 0.0f)
      throw Refused("zero_scale", "quantisation block " + std::to_string(block) +
                                      " has scale 0 and a code that is not 0");
    begin = end;
  }
  if (plane.codec == Codec::int4 && (plane.stored & 1) &&
      plane.values[plane.stored >> 1] >> 4 != 0)
    throw Refused("value_padding", "the spare half byte behind the 4-bit codes is not zero");
}

}  // namespace

void check_values(const ValuePlane& plane, bool allow_nonfinite) {
  if (is_quantised(plane.codec)) {
    check_scales(plane);
    check_codes(plane);
    return;
  }
  if (allow_nonfinite) return;
  float chunk[kChunk];
  for (u64 start = 0; start < plane.stored; start += kChunk) {
    const u32 count = static_cast<u32>(std::min<u64>(kChunk, plane.stored - start));
    decode_values(plane, start, count, chunk);
    if (!finite_bits(largest_magnitude(chunk, count))) nonfinite();
  }
}

namespace {

template <class Bits>
void check_raw(const u8* values, u32 count, bool dense, bool allow_nonfinite, Bits infinity) {
  constexpr Bits kMagnitude = static_cast<Bits>(static_cast<Bits>(~Bits{0}) >> 1);
  Bits largest = 0;
  Bits any = 0;
  u32 zeros = 0;
  for (u32 i = 0; i < count; ++i) {
    const Bits bits = load<Bits>(values + sizeof(Bits) * i);
    largest = std::max<Bits>(largest, bits & kMagnitude);
    any |= bits;
    zeros += bits == 0;
  }
  if (!allow_nonfinite && largest >= infinity) nonfinite();
  if (dense && any == 0)
    throw Refused("empty_block", "a dense block holds only zeros; it must be absent");
  if (!dense && zeros != 0)
    throw Refused("zero_value", std::to_string(zeros) + " stored raw value(s) of a block that "
                                                        "is not dense are zero");
}

}  // namespace

void check_raw_block(const ValuePlane& plane, u64 start, u32 count, bool dense,
                     bool allow_nonfinite) {
  const u8* values = plane.values + dtype_bytes(plane.dtype) * start;
  if (plane.dtype == Dtype::f32)
    check_raw<u32>(values, count, dense, allow_nonfinite, kF32Infinity);
  else
    check_raw<u16>(values, count, dense, allow_nonfinite,
                   plane.dtype == Dtype::f16 ? kF16Infinity : kBf16Infinity);
}

}  // namespace rle
