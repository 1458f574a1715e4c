#define XXH_INLINE_ALL
#include "xxhash.h"

#include "rle.h"

namespace rle {

u64 xxh3(const u8* bytes, u64 length) { return XXH3_64bits(bytes, length); }

u64 header_hash(const u8* header, const u8* directory, u64 directory_bytes) {
  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  XXH3_64bits_update(&state, header, kHashedHeaderBytes);
  XXH3_64bits_update(&state, directory, directory_bytes);
  return XXH3_64bits_digest(&state);
}

}  // namespace rle
