"""Documents → one token stream → windows and batches.

Shapes: N windows or tokens, B sequences of a batch, V size of the vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samv2.common.errors import DataError

_DOCUMENTS_PER_CALL = 256


def tokenize_documents(tokenizer: Any, documents: Sequence[str]) -> Tensor:
    """Turn documents into one stream of tokens.

    Args:
        tokenizer: a Hugging Face tokenizer with an end-of-sequence token.
        documents: texts, in order.

    Returns:
        Long (N,): the documents' tokens, with one end-of-sequence token between two
        documents and no other special token.

    Raises:
        DataError: no document, or a tokenizer without an end-of-sequence token.
    """
    if not documents:
        raise DataError("There is no document to tokenize: give at least one.")
    end = end_token(tokenizer)
    pieces: list[Tensor] = []
    for start in range(0, len(documents), _DOCUMENTS_PER_CALL):
        texts = list(documents[start : start + _DOCUMENTS_PER_CALL])
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)
        for ids in encoded["input_ids"]:
            pieces += [torch.tensor([*ids, end], dtype=torch.long)]
    return torch.cat(pieces)[:-1]


def end_token(tokenizer: Any) -> int:
    """Return the id of the end-of-sequence token; DataError if there is none."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            "The tokenizer has no end-of-sequence token, which separates documents: "
            "set `tokenizer.eos_token`."
        )
    return int(tokenizer.eos_token_id)


def windows(stream: Tensor, length: int, limit: int | None = None) -> Tensor:
    """Cut a stream into windows that do not overlap; the rest at its end is left out.

    Args:
        stream: integer (N,).
        length: tokens of a window, at least 1.
        limit: at most this many windows from the start; None for all.

    Returns:
        Long (windows, length).

    Raises:
        DataError: the stream is shorter than one window.
    """
    _check_length(stream, length)
    count = len(stream) // length
    if limit is not None:
        if limit < 1:
            raise DataError(
                f"The limit of windows is {limit}: give 1 or more, or None."
            )
        count = min(count, limit)
    return stream[: count * length].view(count, length).long()


def sample_batch(
    stream: Tensor, batch_size: int, length: int, generator: torch.Generator
) -> Tensor:
    """Draw windows uniformly from all offsets of a stream, with replacement.

    Args:
        stream: integer (N,).
        batch_size: B.
        length: tokens of a window.
        generator: seeded source of the offsets; it advances by one draw of B numbers.

    Returns:
        Long (B, length).

    Raises:
        DataError: the stream is shorter than one window.
    """
    _check_length(stream, length)
    if batch_size < 1:
        raise DataError(f"The batch size is {batch_size}: give 1 or more.")
    offsets = torch.randint(
        len(stream) - length + 1, (batch_size,), generator=generator
    )
    return stream[offsets[:, None] + torch.arange(length)].long()


def token_histogram(stream: Tensor, vocab_size: int) -> NDArray[np.int64]:
    """Count how often each token occurs.

    Args:
        stream: integer (N,) with values in [0, vocab_size).
        vocab_size: V.

    Returns:
        int64 (V,).

    Raises:
        DataError: a token lies outside the vocabulary.
    """
    if len(stream) and not 0 <= int(stream.min()) <= int(stream.max()) < vocab_size:
        raise DataError(
            f"The stream holds tokens from {int(stream.min())} to {int(stream.max())}, "
            f"but the vocabulary has {vocab_size}: use the tokenizer's `len()`."
        )
    counts: NDArray[np.int64] = torch.bincount(stream, minlength=vocab_size).numpy()
    return counts


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a sha256 of what decides a tokenizer's ids, hexadecimal.

    The vocabulary, the merges and the pre-tokenizer count; padding and truncation,
    which a caller switches at will, do not.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = sorted(tokenizer.get_vocab().items())
    else:
        content = json.loads(backend.to_str())
        content.pop("padding", None)
        content.pop("truncation", None)
    text = json.dumps([content, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_length(stream: Tensor, length: int) -> None:
    if length < 1:
        raise DataError(f"The window length is {length}: give 1 or more tokens.")
    if stream.dim() != 1:
        raise DataError(f"The stream has shape {tuple(stream.shape)}: it must be (N,).")
    if len(stream) < length:
        raise DataError(
            f"The stream has {len(stream)} tokens, fewer than one window of {length}: "
            "use a shorter window or more text."
        )
