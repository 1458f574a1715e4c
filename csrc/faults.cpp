// Messages of what the block codec refuses.
#include <cstring>
#include <string>

#include "rle.h"

namespace rle {

namespace {

std::string message_of(const Fault& fault) {
  const std::string reason = fault.reason;
  const std::string found = std::to_string(fault.found);
  const std::string limit = std::to_string(fault.limit);
  if (reason == "unary")
    return "a Rice code in an index stream has " + found + " zero bits, the block allows " +
           limit;
  if (reason == "index_overrun") return "an index stream ends inside a code";
  if (reason == "index_range")
    return "an index stream reaches element " + found + " of a block that has " + limit;
  if (reason == "index_unused")
    return "an index stream has " + found + " byte(s) behind its last code, it needs 0";
  if (reason == "index_padding") return "the spare bits behind an index stream are not zero";
  if (reason == "bitmap_count")
    return "a bitmap has " + found + " set bits, its descriptor says " + limit;
  if (reason == "span_length")
    return "a coded span has " + found + " elements where fewer than " + limit +
           " are left; the last span is implied";
  if (reason == "nonfinite")
    return "a value is NaN or infinite; only finite values are accepted";
  if (reason == "empty_block") return "a dense block holds only zeros; it must be absent";
  if (reason == "zero_value")
    return found + " stored raw value(s) of a block that is not dense are zero";
  if (reason == "scale")
    return "scale " + found + " is negative, or its highest level is not finite";
  if (reason == "code") return "a quantised code is -" + found + ", which no writer makes";
  if (reason == "zero_scale")
    return "quantisation block " + found + " has scale 0 and a code that is not zero";
  if (reason == "value_padding")
    return "the spare half byte behind the 4-bit codes is not zero";
  return "the frame is malformed";
}

}  // namespace

void refuse(const Fault& fault) { throw Refused(fault.reason, message_of(fault)); }

}  // namespace rle
