#include "seeds.h"

#include "numbers.h"

namespace rle::fuzz {

namespace {

constexpr u64 kLargestSeed = u64{1} << 15;

// Whether element i is set, in one of the shapes that call for one mode each.
bool is_set(u64 shape, u64 i) {
  const u64 noise = mix(shape * 1000003 + i);
  switch (shape % 6) {
    case 0: return true;
    case 1: return noise % 100 < 3;
    case 2: return noise % 2 == 0;
    case 3: return noise % 100 < 95;
    case 4: return i % 150 < 60;
    default: return false;
  }
}

u32 bits_at(u64 i, Dtype dtype) {
  const float value = (static_cast<float>(mix(i) % 2001) - 1000.5f) / 512.0f;
  switch (dtype) {
    case Dtype::f32: return bits_of(value);
    case Dtype::f16: return to_f16(value);
    default: return to_bf16(value);
  }
}

Bytes tensor_bytes(const ManifestRow& row, u64 shape) {
  const u64 width = dtype_bytes(row.dtype);
  Bytes bytes(width * row.numel, 0);
  for (u64 i = 0; i < row.numel; ++i) {
    if (!is_set(shape, i)) continue;
    const u32 bits = bits_at(i, row.dtype);
    std::memcpy(bytes.data() + width * i, &bits, width);
  }
  return bytes;
}

Bytes seed(std::size_t manifest, u64 variant, const PackOptions& options) {
  const std::vector<ManifestRow>& rows = manifest_rows(manifest);
  std::vector<Bytes> data;
  std::vector<SourceTensor> sources;
  data.reserve(rows.size());
  for (const ManifestRow& row : rows) {
    data.push_back(tensor_bytes(row, variant + data.size()));
    sources.push_back({row.id, row.dtype, row.numel, data.back().data()});
  }
  const FrameWriter writer(sources, options);
  Bytes bytes(kControlBytes + writer.size());
  bytes[0] = static_cast<u8>(manifest);
  bytes[1] = static_cast<u8>(variant << 1);
  bytes[2] = static_cast<u8>(options.round);
  Bytes frame(writer.size());
  writer.write(frame.data());
  std::memcpy(bytes.data() + kControlBytes, frame.data(), frame.size());
  return bytes;
}

}  // namespace

std::vector<Bytes> seeds() {
  std::vector<Bytes> all;
  u64 variant = 0;
  for (std::size_t manifest = 0; manifest < manifest_count(); ++manifest)
    for (const Codec codec : kCodecs)
      for (const int block_log2 : {kMinBlockLog2, kMaxBlockLog2}) {
        PackOptions options;
        options.codec = codec;
        options.block_log2 = block_log2;
        options.quant_log2 = kMinQuantLog2 + static_cast<int>(variant % 8);
        options.stochastic = variant % 3 == 0;
        options.round = 1;
        options.fingerprint = manifest_fingerprint(manifest);
        Bytes bytes = seed(manifest, variant++, options);
        if (bytes.size() <= kLargestSeed) all.push_back(std::move(bytes));
      }
  return all;
}

}  // namespace rle::fuzz
