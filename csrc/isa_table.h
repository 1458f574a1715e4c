// Makes the table of one instruction set; included once by each isa_*.cpp.
#define XXH_INLINE_ALL
#if RLE_LEVEL == 2
#define XXH_VECTOR XXH_AVX512
#elif RLE_LEVEL == 1
#define XXH_VECTOR XXH_AVX2
#endif
#include "xxhash.h"

#include "index_block.h"
#include "masked_block.h"
#include "value_block.h"

namespace rle {
namespace {

static_assert(sizeof(XXH3_state_t) <= sizeof(HashState) && alignof(XXH3_state_t) <= 64,
              "HashState is too small for this xxhash");

void hash_reset(HashState& state) {
  XXH3_64bits_reset(reinterpret_cast<XXH3_state_t*>(state.bytes));
}
void hash_update(HashState& state, const u8* bytes, u64 count) {
  XXH3_64bits_update(reinterpret_cast<XXH3_state_t*>(state.bytes), bytes, count);
}
u64 hash_digest(const HashState& state) {
  return XXH3_64bits_digest(reinterpret_cast<const XXH3_state_t*>(state.bytes));
}

constexpr Isa make_table(const char* name) {
  return {
      name,
      masks_of,
      encode_index,
      gather,
      gather_under,
      widen,
      encode_values,
      decode_index,
      check_values,
      survey_raw,
      decode_values,
      narrow,
      expand,
      add,
      add_gaps,
      add_dense,
      sum_of_squares,
      count_bits,
      copy_bytes,
      zero_bytes,
      fence,
      hash_reset,
      hash_update,
      hash_digest,
  };
}

}  // namespace
}  // namespace rle
