#include <algorithm>

#include "numbers.h"
#include "rle.h"

namespace rle {

namespace {

constexpr u32 kOverrun = 64;  // bytes that `gather` may write too many
// Values of blocks up to this share of set elements are kept when the index is planned:
// that costs less than reading the block a second time.
constexpr u32 kKeptShare = 32;

// A codec of the source's own width stores its bits as they are.
Codec effective_codec(Codec codec, Dtype dtype) {
  const bool same = (codec == Codec::bf16 && dtype == Dtype::bf16) ||
                    (codec == Codec::f16 && dtype == Dtype::f16);
  return same ? Codec::raw : codec;
}

u64 padding_to_values(u64 offset) { return (0 - offset) & (kValueAlignment - 1); }

const u8* address(const SourceTensor& tensor, u64 element) {
  return static_cast<const u8*>(tensor.data) + dtype_bytes(tensor.dtype) * element;
}

[[noreturn]] void cannot_code(Codec codec) {
  const char* const names[] = {"raw", "bf16", "f16", "int8", "nf4", "int4"};
  throw std::invalid_argument(std::string("a value is not finite, or is not after rounding to ") +
                              names[static_cast<int>(codec)] +
                              "; clip the update, or pack it with codec 'raw'");
}

// The plan counted the values of a tensor, and there are now more or fewer of them.
[[noreturn]] void changed() {
  throw std::invalid_argument(
      "a tensor changed while it was packed; let no other thread write to it");
}

// Appends the values of one body to the frame and to its hash; never more than planned.
class Sink {
 public:
  Sink(u8* at, const u8* body_end, const u8* frame_end, bool stream, HashState& hash)
      : at_(at),
        body_end_(body_end),
        frame_end_(frame_end),
        stream_(stream),
        aligned_((reinterpret_cast<std::uintptr_t>(at) & 3) == 0),
        hash_(hash) {}

  // Where up to `count` bytes and kOverrun more may be written before they are committed:
  // in the frame, or at its very end in `spare`.
  u8* room(u64 count, u8* spare) const {
    const bool fits = static_cast<u64>(frame_end_ - at_) >= count + kOverrun;
    return aligned_ && fits ? at_ : spare;
  }

  void commit(const u8* room, u64 count) {
    if (room != at_) return put(room, count);
    expect_room(count);
    isa().hash_update(hash_, at_, count);
    at_ += count;
  }

  void put(const u8* bytes, u64 count) {
    expect_room(count);
    isa().hash_update(hash_, bytes, count);
    isa().copy(at_, bytes, count, stream_);
    at_ += count;
  }

  void finish() const {
    if (at_ != body_end_) changed();
    if (stream_) isa().fence();
  }

 private:
  void expect_room(u64 count) const {
    if (count > static_cast<u64>(body_end_ - at_)) changed();
  }

  u8* at_;
  const u8* body_end_;
  const u8* frame_end_;
  bool stream_;
  bool aligned_;  // frames may be written to any address
  HashState& hash_;
};

// Codes values piece by piece; whole quantisation blocks go out, the rest waits.
class LossyWriter {
 public:
  LossyWriter(const Coding& coding, bool stochastic, u64 key, Sink& sink)
      : coding_(coding),
        stochastic_(stochastic),
        key_(key),
        sink_(sink),
        values_(kMaxQuantBlock + kPiece),
        elements_(stochastic ? values_.size() : 0),
        codes_(2 * values_.size()),
        piece_scales_(4 * values_.size() >> kMinQuantLog2) {}

  // Room for kPiece values, and with stochastic rounding for their elements.
  float* values() { return values_.data() + waiting_; }
  u64* elements() { return elements_.data() + waiting_; }

  void push(u32 count) {
    waiting_ += count;
    const u32 whole = waiting_ >> coding_.quant_log2 << coding_.quant_log2;
    write(whole);
    std::copy(values_.begin() + whole, values_.begin() + waiting_, values_.begin());
    if (stochastic_)
      std::copy(elements_.begin() + whole, elements_.begin() + waiting_, elements_.begin());
    waiting_ -= whole;
  }

  void finish() {
    write(waiting_);
    sink_.put(scales_.data(), scales_.size());
  }

 private:
  void write(u32 count) {
    if (count == 0) return;
    const Rounding rounding{stochastic_, key_, elements_.data()};
    if (!isa().encode_values(coding_, rounding, values_.data(), count, codes_.data(),
                             piece_scales_.data()))
      cannot_code(coding_.codec);
    sink_.put(codes_.data(), value_plane_bytes(count, coding_.codec, coding_.dtype));
    const u64 scales = scale_plane_bytes(count, coding_.codec, coding_.quant_log2);
    scales_.insert(scales_.end(), piece_scales_.begin(), piece_scales_.begin() + scales);
  }

  Coding coding_;
  bool stochastic_;
  u64 key_;
  Sink& sink_;
  u32 waiting_ = 0;
  std::vector<float> values_;
  std::vector<u64> elements_;
  std::vector<u8> codes_;
  std::vector<u8> piece_scales_;
  std::vector<u8> scales_;
};

// Places of the set elements of a piece, or of all.
void list_elements(const u8* piece, u64 width, u32 count, u64 base, bool dense, u64* out) {
  if (dense) {
    for (u32 i = 0; i < count; ++i) *out++ = base + i;
    return;
  }
  u64 masks[kPiece / 64];
  isa().masks(piece, width, count, masks);
  for (u32 w = 0; w < (count + 63) / 64; ++w)
    for (u64 m = masks[w]; m != 0; m &= m - 1)
      *out++ = base + w * 64 + static_cast<u64>(__builtin_ctzll(m));
}

// Spans so long that their stream is a small part of a bitmap, in a block of which most is
// clear and need not be read again.
bool has_long_spans(const BlockIndex& block) {
  return block.mode == Mode::spans && block.index_bytes <= block.elements / 256 &&
         block.stored <= block.elements / 4;
}

// Values of a block whose set elements stand in long spans: whole words of them are put as they
// are, and clear ones are not read.
template <class Put>
void write_spans(const BlockIndex& block, const u8* stream, const u8* elements, u64 width,
                 u64* masks, u8* packed, Put put) {
  isa().decode_index(block, stream, masks);
  const u32 words = (block.elements + 63) / 64;
  for (u32 w = 0; w < words;) {
    const u8* at = elements + w * 64 * width;
    const bool full = masks[w] == ~u64{0};
    u32 stop = w + 1;
    while (stop < words && stop - w < kPiece / 64 && masks[w] != 0 && masks[stop] != 0 &&
           (masks[stop] == ~u64{0}) == full)
      ++stop;
    if (full) {
      put(at, (stop - w) * 64);
    } else if (masks[w] != 0) {
      const u32 count = std::min(block.elements, stop * 64) - w * 64;
      put(packed, isa().gather_under(masks + w, at, width, count, packed));
    }
    w = stop;
  }
}

}  // namespace

FrameWriter::FrameWriter(const std::vector<SourceTensor>& tensors, const PackOptions& options)
    : tensors_(tensors), options_(options) {
  const std::unique_ptr<Scratch> scratch(new Scratch);
  const std::unique_ptr<u8[]> packed(new u8[4 * kMaxBlock + kOverrun]);
  size_ = kHeaderBytes + kEntryBytes * tensors.size();
  for (const SourceTensor& tensor : tensors) {
    Body body = plan(tensor, *scratch, packed.get());
    const Coding& coding = body.coding;
    body.begin = size_;
    u64 end = size_ + body.presence.size() + kDescriptorBytes * body.blocks.size() +
              body.index.size();
    end += padding_to_values(end);
    end += value_plane_bytes(body.stored, coding.codec, coding.dtype);
    end += scale_plane_bytes(body.stored, coding.codec, coding.quant_log2);
    body.bytes = end - size_;
    size_ = end;
    bodies_.push_back(std::move(body));
  }
  size_ += kTrailerBytes;
}

FrameWriter::Body FrameWriter::plan(const SourceTensor& tensor, Scratch& scratch,
                                    u8* packed) const {
  Body body;
  const Codec codec = effective_codec(options_.codec, tensor.dtype);
  body.coding = {codec, tensor.dtype, is_quantised(codec) ? options_.quant_log2 : 0};
  u64 value_cost = 4096 * value_bits(codec, tensor.dtype);
  if (is_quantised(codec)) value_cost += u64{32} * 4096 >> body.coding.quant_log2;

  const u64 blocks = pieces(tensor.numel, options_.block_log2);
  body.presence.assign(pieces(blocks, 3), 0);
  const u64 width = dtype_bytes(tensor.dtype);
  // All it can need: pages cost only when they are written, growing costs copies.
  body.blocks.reserve(blocks);
  body.index.reserve(pieces(tensor.numel, 3));
  body.kept.reserve(tensor.numel / kKeptShare * width);
  for (u64 b = 0; b < blocks; ++b) {
    const u32 elements = block_elements(tensor.numel, b, options_.block_log2);
    const u8* block = address(tensor, b << options_.block_log2);
    const u32 set = isa().masks(block, width, elements, scratch.masks);
    if (set == 0) continue;
    body.presence[b >> 3] |= static_cast<u8>(1u << (b & 7));
    const BlockIndex index = isa().encode_index(scratch, elements, set, value_cost);
    body.index.insert(body.index.end(), scratch.index, scratch.index + index.index_bytes);
    if (keeps_values(index)) {
      const u32 stored =
          isa().gather_under(scratch.masks, block, width, elements, packed);
      if (stored != index.stored) changed();
      body.kept.insert(body.kept.end(), packed, packed + stored * width);
    }
    body.stored += index.stored;
    body.blocks.push_back(index);
  }
  return body;
}

bool FrameWriter::keeps_values(const BlockIndex& block) const {
  return block.mode != Mode::dense && !has_long_spans(block) &&
         block.stored <= block.elements / kKeptShare && !options_.stochastic;
}

void FrameWriter::write(u8* out) const {
  HashState hash;
  isa().hash_reset(hash);
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    u8* values = write_index(bodies_[i], out);
    const u8* begin = out + bodies_[i].begin;
    isa().hash_update(hash, begin, static_cast<u64>(values - begin));
    write_values(tensors_[i], bodies_[i], values, begin + bodies_[i].bytes, out + size_, hash);
  }
  write_header(out);
  store(out + size_ - kTrailerBytes, isa().hash_digest(hash));
}

void FrameWriter::write_header(u8* out) const {
  u64 total = 0;
  bool lossless = true;
  u8* at = out + kHeaderBytes;
  for (std::size_t i = 0; i < tensors_.size(); ++i, at += kEntryBytes) {
    const SourceTensor& tensor = tensors_[i];
    const Body& body = bodies_[i];
    total += tensor.numel;
    lossless &= body.coding.codec == Codec::raw;
    store(at, tensor.id);
    at[4] = static_cast<u8>(tensor.dtype);
    at[5] = static_cast<u8>(body.coding.codec);
    at[6] = static_cast<u8>(options_.block_log2);
    at[7] = static_cast<u8>(body.coding.quant_log2);
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

void FrameWriter::write_values(const SourceTensor& tensor, const Body& body, u8* values,
                               const u8* body_end, const u8* frame_end,
                               HashState& hash) const {
  const Coding& coding = body.coding;
  const u64 width = dtype_bytes(tensor.dtype);
  const bool raw = coding.codec == Codec::raw;
  const bool stochastic = options_.stochastic && !raw;
  const u64 bytes = value_plane_bytes(body.stored, coding.codec, coding.dtype);
  Sink sink(values, body_end, frame_end, bytes >= kStreamBytes, hash);
  std::unique_ptr<LossyWriter> lossy;
  if (!raw)
    lossy = std::make_unique<LossyWriter>(
        coding, stochastic, rng_key(options_.seed, options_.round, tensor.id), sink);

  alignas(64) u8 packed[4 * kPiece + kOverrun];
  const auto put = [&](const u8* bits, u32 stored) {
    if (raw) return sink.put(bits, stored * width);
    isa().widen(bits, tensor.dtype, stored, lossy->values());
    lossy->push(stored);
  };
  const u8* kept = body.kept.data();
  const u8* stream = body.index.data();
  u64 masks[kMaskWords];
  auto next = body.blocks.begin();
  const u64 blocks = pieces(tensor.numel, options_.block_log2);
  for (u64 b = 0; b < blocks; ++b) {
    if (!(body.presence[b >> 3] >> (b & 7) & 1)) continue;
    const BlockIndex& block = *next++;
    const u64 base = b << options_.block_log2;
    stream += block.index_bytes;
    if (has_long_spans(block) && !stochastic) {
      write_spans(block, stream - block.index_bytes, address(tensor, base), width, masks, packed,
                  put);
      continue;
    }
    if (keeps_values(block)) {
      for (u32 done = 0; done < block.stored; done += kPiece) {
        const u32 stored = std::min(kPiece, block.stored - done);
        put(kept, stored);
        kept += stored * width;
      }
      continue;
    }
    const bool dense = block.mode == Mode::dense;
    for (u32 begin = 0; begin < block.elements; begin += kPiece) {
      const u32 count = std::min(kPiece, block.elements - begin);
      const u64 element = base + begin;
      const u8* piece = address(tensor, element);
      if (raw && !dense) {
        u8* room = sink.room(count * width, packed);
        sink.commit(room, isa().gather(piece, width, count, room) * width);
        continue;
      }
      const u32 stored = dense ? count : isa().gather(piece, width, count, packed);
      if (stochastic) list_elements(piece, width, count, element, dense, lossy->elements());
      put(dense ? piece : packed, stored);
    }
  }
  if (!raw) lossy->finish();
  sink.finish();
}

}  // namespace rle
