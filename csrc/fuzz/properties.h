// What must hold for every input, hostile or not.
#pragma once

#include "input.h"

namespace rle::fuzz {

struct Verdict {
  const char* reason;  // slug of the refusal, null if the frame was accepted
  u64 digest;          // of the reason or of all decoded bits: equal on all machines
};

// Parses, checks, decodes, adds and repacks; aborts with a message if a property fails:
//
// - parse and validate return or throw Refused, nothing else;
// - beside the workspace, which is the same for every frame, parse and validate never hold
//   more heap than 8 bytes a byte of frame + 4 KiB; so a refused frame costs no more either;
// - checking and decoding in one pass gives the same verdict, reason and bits;
// - what parse accepts with a manifest it accepts without one;
// - decode writes all elements, whatever was there before, and nothing around them;
// - what was decoded is finite, unless non-finite values are allowed;
// - accumulate onto +0.0 and -0.0 gives the sums that the decoded tensor gives, and changes
//   as many elements as the frame says are stored;
// - the decoded tensors, packed raw to an odd address, are accepted and decode to the same
//   bits; packed with a lossy codec, they are accepted or the writer throws
//   invalid_argument.
Verdict check(const Input& input);

}  // namespace rle::fuzz
