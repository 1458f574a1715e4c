"""Reasons of refusal in words, for people who look at a frame."""

from __future__ import annotations

from collections.abc import Mapping

REASONS: Mapping[str, str] = {
    "truncated": "fewer than 72 bytes",
    "magic": "the first four bytes are others: not a frame",
    "version": "another major version, or a higher minor version with flags",
    "flags": "an unknown flag, or the lossless flag contradicts the codecs",
    "frame_length": "the stated length is not the number of bytes received",
    "tensor_count": "more tensors than the manifest has",
    "directory_length": "not 32 bytes a tensor, or longer than the frame",
    "header_hash": "header or directory were damaged",
    "reserved": "the reserved header word is not zero",
    "fingerprint": "packed with another manifest",
    "round": "packed for another round",
    "id_order": "ids do not increase strictly; duplicates included",
    "dtype": "unknown source dtype, or not the manifest's",
    "codec": "value codec unknown, not supported, or not allowed for the dtype",
    "block_size": "block size outside 2^12 to 2^16",
    "quant_block": "quantisation block outside 2^5 to 2^12, or stated for a codec "
    "without scales",
    "unknown_id": "an id that the manifest does not have",
    "numel": "element count is not the manifest's",
    "nnz": "more stored values than elements",
    "total_numel": "total elements are not the sum of the directory, or overflow",
    "body_length": "a body or one of its parts does not fit its length",
    "body_hash": "a body was damaged",
    "presence_padding": "spare presence bits are set",
    "mode": "unknown block mode",
    "descriptor_reserved": "the reserved word of a descriptor is not zero",
    "rice_parameter": "a Rice parameter where the mode uses none",
    "block_count": "a dense block that does not store all its elements, or another "
    "that does",
    "index_length": "index length against the rule of the mode",
    "nnz_sum": "descriptors and directory disagree on the stored values",
    "padding": "padding before the value plane is not zero",
    "index_overrun": "an index stream ends inside a code",
    "unary": "more zero bits in a Rice code than the block allows",
    "index_range": "a position beyond the block",
    "index_padding": "spare bits of an index stream are set",
    "index_unused": "bytes behind the last code of an index stream",
    "bitmap_count": "a bitmap with another number of ones than stored values",
    "span_length": "a coded set span leaves no stored value for the last one",
    "nonfinite": "a value is NaN or infinite",
    "zero_value": "a stored raw zero outside a dense block",
    "empty_block": "a dense raw block of zeros",
    "scale": "a negative or non-finite scale, or one whose highest level is not finite",
    "code": "a quantised code below −127 or −7",
    "zero_scale": "scale 0 with a code other than 0",
    "value_padding": "the spare half byte after 4-bit codes is not zero",
}
"""What each reason of refusal means, as docs/wire_format.md has it."""
