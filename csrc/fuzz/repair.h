// Makes the numbers of a changed frame agree again, so that readers get past them.
#pragma once

#include "anatomy.h"

namespace rle::fuzz {

// Which rules are restored; what is left out stays as it is.
struct Repair {
  bool identity = true;  // header fields, ids, dtypes and sizes as the receiver has them
  bool counts = true;    // presence bits, stored values of descriptors and entry
  bool planes = true;    // sizes of values and scales
  bool lengths = true;   // stream, padding, body, directory and frame; tensors, elements, flag
};

void repair(Anatomy& anatomy, const Repair& what);

}  // namespace rle::fuzz
