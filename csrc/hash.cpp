#include "rle.h"

namespace rle {

u64 xxh3(const u8* bytes, u64 length) {
  HashState state;
  isa().hash_reset(state);
  isa().hash_update(state, bytes, length);
  return isa().hash_digest(state);
}

u64 header_hash(const u8* header, const u8* directory, u64 directory_bytes) {
  HashState state;
  isa().hash_reset(state);
  isa().hash_update(state, header, kHashedHeaderBytes);
  isa().hash_update(state, directory, directory_bytes);
  return isa().hash_digest(state);
}

}  // namespace rle
