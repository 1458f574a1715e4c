#include "input.h"

#include <iterator>

namespace rle::fuzz {

namespace {

constexpr Dtype kF32 = Dtype::f32, kF16 = Dtype::f16, kBf16 = Dtype::bf16;

struct Manifest {
  u64 fingerprint;
  std::vector<ManifestRow> rows;
};

std::vector<ManifestRow> many_rows() {
  std::vector<ManifestRow> rows;
  for (u32 i = 0; i < 40; ++i) rows.push_back({i * i, static_cast<Dtype>(i % 3), i});
  rows.push_back({~u32{0}, kF32, 33});
  return rows;
}

const std::vector<Manifest>& manifests() {
  static const std::vector<Manifest> all = {
      // tests/golden
      {0x8fec95c3b3098437ull,
       {{1, kF32, 300},
        {2, kF32, 200},
        {3, kF32, 200},
        {5, kF32, 999},
        {8, kF32, 400},
        {13, kBf16, 900},
        {21, kF16, 77},
        {34, kF32, 5},
        {55, kBf16, 0}}},
      {1, {{7, kF32, 100}}},
      {2, {}},
      // Tails of words and blocks.
      {3, {{1, kF32, 63}, {2, kF16, 64}, {3, kBf16, 65}, {4, kF32, 1}, {5, kF32, 4095}}},
      {4, {{1, kF32, 4096}, {2, kF16, 4097}}},
      {5, {{3, kBf16, 3 * 4096 + 1}, {9, kF32, 1000}}},
      {6, many_rows()},
      // A block of the largest size, or more than eight of the smallest.
      {7, {{0, kF16, 65536 + 63}}},
  };
  return all;
}

}  // namespace

std::size_t manifest_count() { return manifests().size(); }

const std::vector<ManifestRow>& manifest_rows(std::size_t which) {
  return manifests()[which].rows;
}

u64 manifest_fingerprint(std::size_t which) { return manifests()[which].fingerprint; }

Input read_input(const u8* bytes, u64 size) {
  const Manifest& manifest = manifests()[bytes[0] % manifests().size()];
  const unsigned choice = bytes[1] >> 1;
  PackOptions repack;
  repack.codec = kCodecs[choice % std::size(kCodecs)];
  repack.block_log2 = kMinBlockLog2 + static_cast<int>(choice % 3) * 2;
  repack.quant_log2 = kMinQuantLog2 + static_cast<int>(choice % 8);
  repack.stochastic = choice % 2 != 0;
  repack.round = bytes[2];
  repack.fingerprint = manifest.fingerprint;
  return {{manifest.rows, manifest.fingerprint, bytes[2]},
          (bytes[1] & 1) != 0,
          repack,
          bytes + kControlBytes,
          size - kControlBytes};
}

}  // namespace rle::fuzz
