// Accepted inputs from the product's own encoder: all manifests, codecs and modes.
#pragma once

#include "anatomy.h"

namespace rle::fuzz {

std::vector<Bytes> seeds();

}  // namespace rle::fuzz
