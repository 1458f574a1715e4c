#include <algorithm>

#include "masked.h"
#include "rle.h"

namespace rle {

namespace {

constexpr u32 kMaxWords = kMaxBlock / 64;

// Bit i of the result: element i has a bit set. Portable pack of 8 flags at a time.
template <class Bits>
u64 mask_of_64(const Bits* elements) {
  u8 flags[64];
  Bits any = 0;
  for (int i = 0; i < 64; ++i) any |= elements[i];
  if (any == 0) return 0;
  for (int i = 0; i < 64; ++i) flags[i] = elements[i] != 0;
  u64 mask = 0;
  for (int i = 0; i < 8; ++i)
    mask |= (load<u64>(flags + 8 * i) * 0x0102040810204080ull >> 56) << (8 * i);
  return mask;
}

// Fills the masks of a block; false if no element is set.
template <class Bits>
bool build_masks(const Bits* elements, u32 count, u64* masks) {
  u64 any = 0;
  const u32 full = count / 64;
  for (u32 w = 0; w < full; ++w) {
    masks[w] = mask_of_64(elements + 64 * w);
    any |= masks[w];
  }
  if (count & 63) {
    u64 mask = 0;
    for (u32 i = full * 64; i < count; ++i) mask |= u64{elements[i] != 0} << (i & 63);
    masks[full] = mask;
    any |= mask;
  }
  return any != 0;
}

// A codec of the source's own width stores its bits as they are.
Codec effective_codec(Codec codec, Dtype dtype) {
  const bool same = (codec == Codec::bf16 && dtype == Dtype::bf16) ||
                    (codec == Codec::f16 && dtype == Dtype::f16);
  return same ? Codec::raw : codec;
}

u64 padding_to_values(u64 offset) { return (0 - offset) & (kValueAlignment - 1); }

u32 elements_of(const SourceTensor& tensor, u64 block, int block_log2) {
  const u64 left = tensor.numel - (block << block_log2);
  return static_cast<u32>(std::min<u64>(left, u64{1} << block_log2));
}

}  // namespace

FrameWriter::FrameWriter(const std::vector<SourceTensor>& tensors, const PackOptions& options)
    : tensors_(tensors), options_(options) {
  IndexEncoder encoder;
  size_ = kHeaderBytes + kEntryBytes * tensors.size();
  for (const SourceTensor& tensor : tensors) {
    Body body = plan(tensor, encoder);
    body.begin = size_;
    u64 end = size_ + body.presence.size() + kDescriptorBytes * body.blocks.size() +
              body.index.size();
    end += padding_to_values(end);
    end += value_plane_bytes(body.stored, body.codec, tensor.dtype);
    end += scale_plane_bytes(body.stored, body.codec, body.quant_log2);
    body.bytes = end - size_;
    size_ = end;
    bodies_.push_back(std::move(body));
  }
  size_ += kTrailerBytes;
}

FrameWriter::Body FrameWriter::plan(const SourceTensor& tensor, IndexEncoder& encoder) const {
  Body body;
  body.codec = effective_codec(options_.codec, tensor.dtype);
  body.quant_log2 = is_quantised(body.codec) ? options_.quant_log2 : 0;
  u64 value_cost = 4096 * value_bits(body.codec, tensor.dtype);
  if (is_quantised(body.codec)) value_cost += u64{32} * 4096 >> body.quant_log2;

  const u64 blocks = pieces(tensor.numel, options_.block_log2);
  body.presence.assign(pieces(blocks, 3), 0);
  u64 masks[kMaxWords];
  for (u64 b = 0; b < blocks; ++b) {
    const u64 base = b << options_.block_log2;
    const u32 elements = elements_of(tensor, b, options_.block_log2);
    const bool any =
        tensor.dtype == Dtype::f32
            ? build_masks(static_cast<const u32*>(tensor.data) + base, elements, masks)
            : build_masks(static_cast<const u16*>(tensor.data) + base, elements, masks);
    if (!any) continue;
    body.presence[b >> 3] |= static_cast<u8>(1u << (b & 7));
    const BlockIndex index = encoder.encode(masks, elements, value_cost, body.index);
    if (index.mode != Mode::dense)
      body.masks.insert(body.masks.end(), masks, masks + mask_words(elements));
    body.stored += index.stored;
    body.blocks.push_back(index);
  }
  return body;
}

void FrameWriter::write(u8* out) const {
  for (std::size_t i = 0; i < tensors_.size(); ++i)
    write_values(tensors_[i], bodies_[i], write_index(bodies_[i], out));
  write_header(out);
  const u64 bodies = kHeaderBytes + kEntryBytes * tensors_.size();
  const u64 end = size_ - kTrailerBytes;
  store(out + end, xxh3(out + bodies, end - bodies));
}

void FrameWriter::write_header(u8* out) const {
  u64 total = 0;
  bool lossless = true;
  u8* at = out + kHeaderBytes;
  for (std::size_t i = 0; i < tensors_.size(); ++i, at += kEntryBytes) {
    const SourceTensor& tensor = tensors_[i];
    const Body& body = bodies_[i];
    total += tensor.numel;
    lossless &= body.codec == Codec::raw;
    store(at, tensor.id);
    at[4] = static_cast<u8>(tensor.dtype);
    at[5] = static_cast<u8>(body.codec);
    at[6] = static_cast<u8>(options_.block_log2);
    at[7] = static_cast<u8>(body.quant_log2);
    store(at + 8, tensor.numel);
    store(at + 16, body.stored);
    store(at + 24, body.bytes);
  }
  const u64 directory = kEntryBytes * tensors_.size();
  std::memcpy(out, kMagic, sizeof kMagic);
  out[4] = kMajor;
  out[5] = kMinor;
  store(out + 6, static_cast<u16>((lossless ? kFlagLossless : 0) |
                                  (options_.error_feedback ? kFlagErrorFeedback : 0)));
  store(out + 8, size_);
  store(out + 16, static_cast<u32>(tensors_.size()));
  store(out + 20, static_cast<u32>(directory));
  store(out + 24, total);
  store(out + 32, options_.fingerprint);
  store(out + 40, options_.round);
  store(out + 48, u64{0});
  store(out + 56, header_hash(out, out + kHeaderBytes, directory));
}

u8* FrameWriter::write_index(const Body& body, u8* out) const {
  u8* at = out + body.begin;
  const auto append = [&at](const void* from, std::size_t bytes) {
    if (bytes > 0) std::memcpy(at, from, bytes);
    at += bytes;
  };
  append(body.presence.data(), body.presence.size());
  for (const BlockIndex& block : body.blocks) {
    at[0] = static_cast<u8>(block.mode);
    at[1] = static_cast<u8>(block.k0 | block.k1 << 4);
    store(at + 2, static_cast<u16>(block.stored - 1));
    store(at + 4, static_cast<u16>(block.index_bytes));
    store(at + 6, u16{0});
    at += kDescriptorBytes;
  }
  append(body.index.data(), body.index.size());
  const u64 padding = padding_to_values(static_cast<u64>(at - out));
  std::memset(at, 0, padding);
  return at + padding;
}

void FrameWriter::write_values(const SourceTensor& tensor, const Body& body, u8* values) const {
  const bool raw = body.codec == Codec::raw;
  const bool wide = tensor.dtype == Dtype::f32;
  const bool stochastic = options_.stochastic && !raw;
  ValueEncoder encoder({body.codec, tensor.dtype, body.quant_log2, stochastic,
                        CounterRng(options_.seed, options_.round, tensor.id)},
                       values, values + value_plane_bytes(body.stored, body.codec, tensor.dtype));
  const u64 scratch = std::min<u64>(tensor.numel, kMaxBlock);
  std::vector<u32> bits(raw ? 0 : scratch);
  std::vector<float> floats(raw ? 0 : scratch);
  std::vector<u64> elements(stochastic ? scratch : 0);
  const u64* masks = body.masks.data();

  auto block = body.blocks.begin();
  const u64 blocks = pieces(tensor.numel, options_.block_log2);
  for (u64 b = 0; b < blocks; ++b) {
    if (!(body.presence[b >> 3] >> (b & 7) & 1)) continue;
    const u64 base = b << options_.block_log2;
    const u32 words = mask_words(block->elements);
    const bool dense = block->mode == Mode::dense;
    const auto collect = [&](const auto* data, auto* to) {
      if (dense)
        std::memcpy(to, data + base, sizeof(*data) * block->stored);
      else
        gather(data + base, masks, block->elements, to);
    };
    if (wide) {
      u32* to = raw ? reinterpret_cast<u32*>(values) : bits.data();
      collect(static_cast<const u32*>(tensor.data), to);
    } else {
      u16* to = raw ? reinterpret_cast<u16*>(values) : reinterpret_cast<u16*>(bits.data());
      collect(static_cast<const u16*>(tensor.data), to);
    }
    if (raw) {
      values += dtype_bytes(tensor.dtype) * block->stored;
    } else {
      const u16* narrow = reinterpret_cast<const u16*>(bits.data());
      for (u32 i = 0; i < block->stored; ++i)
        floats[i] = from_source(wide ? bits[i] : narrow[i], tensor.dtype);
      if (stochastic) {
        u64* next = elements.data();
        if (dense)
          for (u32 i = 0; i < block->stored; ++i) *next++ = base + i;
        else
          for_each_set(masks, words, [&](u32 p) { *next++ = base + p; });
      }
      encoder.push(floats.data(), elements.data(), block->stored);
    }
    if (!dense) masks += words;
    ++block;
  }
  if (!raw) encoder.finish();
}

}  // namespace rle
