"""Fixtures of the common tests."""

from __future__ import annotations

import pytest


class ByteTokenizer:
    """One token a byte; 256 ends a sequence."""

    eos_token_id: int | None = 256

    def __call__(
        self, text: str, add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": list(text.encode())}


@pytest.fixture
def byte_tokenizer() -> ByteTokenizer:
    """A tokenizer whose ids are the bytes of the text."""
    return ByteTokenizer()
