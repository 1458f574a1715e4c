// The portable copy of the block codec.
#include "isa.h"

#define RLE_LEVEL 0
#include "isa_table.h"

namespace rle {

extern const Isa kScalar;
const Isa kScalar = make_table("scalar");

}  // namespace rle
