#include "properties.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>

#include "memory.h"
#include "numbers.h"

namespace rle::fuzz {

namespace {

constexpr u64 kBytesPerFrameByte = 8;
constexpr u64 kConstantBytes = 4096;
constexpr u64 kCanaryBytes = 64;

[[noreturn]] void violated(const char* property) {
  std::fprintf(stderr, "\nproperty violated: %s\n", property);
  std::abort();
}

void require(bool holds, const char* property) {
  if (!holds) violated(property);
}

// A copy of its own, so that AddressSanitizer sees a read beside it; aligned as by malloc.
class ExactBytes {
 public:
  explicit ExactBytes(u64 size) : size_(size), bytes_(new u8[size]) {}
  ExactBytes(const u8* from, u64 size) : ExactBytes(size) {
    if (size > 0) std::memcpy(bytes_.get(), from, size);
  }
  ExactBytes(u64 size, u8 fill) : ExactBytes(size) { std::memset(bytes_.get(), fill, size); }

  u8* data() { return bytes_.get(); }
  const u8* data() const { return bytes_.get(); }
  u64 size() const { return size_; }

 private:
  u64 size_;
  std::unique_ptr<u8[]> bytes_;
};

Workspace& workspace() {
  static const std::shared_ptr<Workspace> work = make_workspace();
  return *work;
}

// Null if the frame was refused; then `reason` says why. The bound holds for both.
std::optional<Frame> accept(const ExactBytes& bytes, const Expectation* expected,
                              bool allow_nonfinite, const char*& reason) {
  const u64 bound = kBytesPerFrameByte * bytes.size() + kConstantBytes;
  Workspace& work = workspace();
  std::optional<Frame> result;
  const Meter meter;
  try {
    Frame frame = parse(bytes.data(), bytes.size(), expected);
    if (expected != nullptr)
      for (const Entry& entry : frame.entries) validate(frame, entry, allow_nonfinite, work);
    result.emplace(std::move(frame));
    reason = nullptr;
  } catch (const Refused& refused) {
    reason = refused.reason;
  } catch (...) {
    violated("only Refused is thrown");
  }
  require(meter.peak() <= bound, "memory is bounded by the frame");
  return result;
}

u64 tensor_bytes(const Entry& entry) { return entry.numel * dtype_bytes(entry.dtype); }

// Decodes twice over different memory: equal results mean that every element was written.
ExactBytes decoded(const Frame& frame, const Entry& entry) {
  const u64 size = tensor_bytes(entry);
  ExactBytes first(size, 0xA5);
  decode(frame, entry, first.data(), workspace());
  ExactBytes second(size + 2 * kCanaryBytes, 0x5A);
  decode(frame, entry, second.data() + kCanaryBytes, workspace());
  for (u64 i = 0; i < kCanaryBytes; ++i)
    require(second.data()[i] == 0x5A && second.data()[kCanaryBytes + size + i] == 0x5A,
            "decode writes only its elements");
  require(std::memcmp(first.data(), second.data() + kCanaryBytes, size) == 0,
          "decode writes every element");
  return first;
}

bool same_number(float found, float wanted) {
  return bits_of(found) == bits_of(wanted) || (found != found && wanted != wanted);
}

float element(const ExactBytes& tensor, Dtype dtype, u64 i) {
  const u8* at = tensor.data() + dtype_bytes(dtype) * i;
  return from_source(dtype == Dtype::f32 ? load<u32>(at) : load<u16>(at), dtype);
}

// Whether an element is stored, seen from outside: -0.0 plus any number but -0.0 is another.
bool stored_by_sum(float start, float value, float sum) {
  const bool negative_zero = bits_of(value) == bits_of(-0.0f);
  return negative_zero || bits_of(sum) != bits_of(start);
}

void check_sums(const Frame& frame, const Entry& entry, const ExactBytes& tensor) {
  constexpr u64 kGuard = kCanaryBytes / sizeof(float);
  u64 stored = 0;
  for (const float start : {0.0f, -0.0f}) {
    std::vector<float> sums(entry.numel + 2 * kGuard, start);
    accumulate({{&frame, &entry, 1.0f}}, sums.data() + kGuard, workspace());
    for (u64 i = 0; i < kGuard; ++i)
      require(bits_of(sums[i]) == bits_of(start) &&
                  bits_of(sums[kGuard + entry.numel + i]) == bits_of(start),
              "accumulate writes only its elements");
    stored = 0;
    for (u64 i = 0; i < entry.numel; ++i) {
      const float value = element(tensor, entry.dtype, i);
      const float sum = sums[kGuard + i];
      const bool untouched = bits_of(value) == 0 && bits_of(sum) == bits_of(start);
      require(untouched || same_number(sum, start + value),
              "accumulate onto zeros gives the decoded values");
      stored += stored_by_sum(start, value, sum);
    }
  }
  // Counted onto -0.0, which came last.
  require(stored == entry.stored, "accumulate changes the stored elements and no others");
}

// Checking and decoding in one pass gives the verdict and the bits of the separate steps.
void check_one_pass(const ExactBytes& bytes, const Input& input,
                    const std::optional<Frame>& checked, const char* reason) {
  std::vector<ExactBytes> tensors;
  std::vector<void*> outputs;
  try {
    const Frame frame =
        parse(bytes.data(), bytes.size(), &input.expected, BodyHash::later);
    for (const Entry& entry : frame.entries) tensors.emplace_back(tensor_bytes(entry), u8{0x5A});
    for (ExactBytes& tensor : tensors) outputs.push_back(tensor.data());
    check_and_decode(frame, input.allow_nonfinite, outputs, workspace());
  } catch (const Refused& refused) {
    require(!checked, "one pass accepts what the steps accept");
    return require(std::strcmp(refused.reason, reason) == 0,
                   "one pass refuses for the same reason");
  }
  require(checked.has_value(), "one pass refuses what the steps refuse");
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const ExactBytes alone = decoded(*checked, checked->entries[i]);
    require(std::memcmp(tensors[i].data(), alone.data(), alone.size()) == 0,
            "one pass decodes the same bits");
  }
}

void check_finite(const Entry& entry, const ExactBytes& tensor) {
  for (u64 i = 0; i < entry.numel; ++i)
    require(finite_bits(bits_of(element(tensor, entry.dtype, i))),
            "only finite values are decoded unless others are allowed");
}

void check_repacking(const Input& input, const PackOptions& options, const Frame& frame,
                     const std::vector<ExactBytes>& tensors) {
  std::vector<SourceTensor> sources;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const Entry& entry = frame.entries[i];
    sources.push_back({entry.id, entry.dtype, entry.numel, tensors[i].data()});
  }
  const FrameWriter writer(sources, options);
  ExactBytes odd(writer.size() + 1, 0xA5);  // frames are written to any address
  try {
    writer.write(odd.data() + 1);
  } catch (const std::invalid_argument&) {
    return require(options.codec != Codec::raw, "raw packs everything");
  }
  const ExactBytes packed(odd.data() + 1, writer.size());
  const char* reason = nullptr;
  const auto again = accept(packed, &input.expected, input.allow_nonfinite, reason);
  require(again.has_value(), "a decoded tensor packs into an accepted frame");
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    ExactBytes copy(tensors[i].size(), 0xA5);
    decode(*again, again->entries[i], copy.data(), workspace());
    const bool same = std::memcmp(copy.data(), tensors[i].data(), copy.size()) == 0;
    require(same || options.codec != Codec::raw, "packing raw and decoding keeps every bit");
  }
}

}  // namespace

Verdict check(const Input& input) {
  const ExactBytes bytes(input.frame, input.length);
  const char* reason = nullptr;
  const char* reason_alone = nullptr;
  const auto checked = accept(bytes, &input.expected, input.allow_nonfinite, reason);
  const auto alone = accept(bytes, nullptr, input.allow_nonfinite, reason_alone);
  require(!checked || alone, "what a manifest accepts is accepted without one");
  check_one_pass(bytes, input, checked, reason);
  if (!checked) {
    const u8* text = reinterpret_cast<const u8*>(reason);
    return {reason, xxh3(text, std::strlen(reason))};
  }

  std::vector<ExactBytes> tensors;
  u64 digest = 0;
  for (const Entry& entry : checked->entries) {
    tensors.push_back(decoded(*checked, entry));
    check_sums(*checked, entry, tensors.back());
    if (!input.allow_nonfinite) check_finite(entry, tensors.back());
    digest = mix(digest ^ xxh3(tensors.back().data(), tensors.back().size()) ^ entry.id);
  }
  check_repacking(input, input.repack, *checked, tensors);
  PackOptions raw = input.repack;
  raw.codec = Codec::raw;
  raw.quant_log2 = 0;
  check_repacking(input, raw, *checked, tensors);
  return {nullptr, digest};
}

}  // namespace rle::fuzz
