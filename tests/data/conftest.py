"""Fixtures of the data tests: a tokenizer of bytes and text that is cheap to make."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from samv2.data.corpus import Corpus, PartSizes, corpus_from_documents


class ByteTokenizer:
    """One token a byte; 256 ends a document."""

    eos_token_id: int | None = 256

    def __call__(
        self, texts: list[str], add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [list(text.encode()) for text in texts]}

    def __len__(self) -> int:
        return 257

    def get_vocab(self) -> dict[str, int]:
        return {str(number): number for number in range(257)}


@pytest.fixture
def byte_tokenizer() -> ByteTokenizer:
    """A tokenizer whose ids are the bytes of the text."""
    return ByteTokenizer()


def make_documents(name: str, count: int, words: int = 60) -> list[str]:
    """Documents of random words that are unlike those of any other name."""
    generator = random.Random(name)
    letters = generator.sample("abcdefghijklmnopqrstuvwxyz", 12)

    def word() -> str:
        return "".join(generator.choices(letters, k=generator.randint(2, 8)))

    return [
        f"{name} {i} " + " ".join(word() for _ in range(words)) for i in range(count)
    ]


@pytest.fixture
def random_documents() -> Callable[..., list[str]]:
    """Makes documents: (name, count, words=60)."""
    return make_documents


@pytest.fixture
def small_corpus() -> Corpus:
    """Four domains of about 50 train documents each."""
    sizes = PartSizes(
        heldout_bytes=2000,
        calibration_bytes=1000,
        train_bytes=18_000,
        min_train_bytes=1,
    )
    documents = {n: make_documents(n, 80) for n in ("law", "news", "code", "chat")}
    return corpus_from_documents(documents, seed=3, sizes=sizes)
