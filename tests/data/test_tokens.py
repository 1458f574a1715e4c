"""Token streams, windows and batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from samv2.common.errors import DataError
from samv2.data.tokens import (
    sample_batch,
    token_histogram,
    tokenize_documents,
    tokenizer_fingerprint,
    windows,
)


def word_tokenizer(
    words: str = "one two three", eos: str | None = "<e>"
) -> PreTrainedTokenizerFast:
    """A real tokenizer of whole words that would add a begin token if asked to."""
    vocabulary = {word: i for i, word in enumerate(["<e>", "<b>", *words.split()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<e>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, bos_token="<b>"
    )


def test_documents_are_joined_by_the_end_token() -> None:
    stream = tokenize_documents(word_tokenizer(), ["one two", "three", "two"])
    assert stream.tolist() == [2, 3, 0, 4, 0, 3]
    assert stream.dtype == torch.long


def test_many_documents_keep_their_order(byte_tokenizer: Any) -> None:
    documents = [str(number) for number in range(1000)]
    stream = tokenize_documents(byte_tokenizer, documents)
    joined = "|".join(documents)
    assert stream.tolist() == [256 if c == "|" else ord(c) for c in joined]


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    with pytest.raises(DataError, match="eos_token"):
        tokenize_documents(word_tokenizer(eos=None), ["one"])


def test_no_document_is_an_error(byte_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no document"):
        tokenize_documents(byte_tokenizer, [])


def test_windows_do_not_overlap_and_drop_the_rest() -> None:
    stream = torch.arange(11, dtype=torch.int32)
    assert windows(stream, 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert windows(stream, 3).dtype == torch.long
    assert windows(stream, 3, limit=2).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert windows(stream, 11, limit=9).tolist() == [list(range(11))]


def test_batches_are_windows_of_the_stream_and_follow_the_generator() -> None:
    stream = torch.arange(50, dtype=torch.int32)

    def draw(seed: int) -> torch.Tensor:
        return sample_batch(stream, 64, 7, torch.Generator().manual_seed(seed))

    batch = draw(0)
    assert batch.shape == (64, 7) and batch.dtype == torch.long
    assert (batch - batch[:, :1] == torch.arange(7)).all()
    assert torch.equal(batch, draw(0)) and not torch.equal(batch, draw(1))


def test_batches_reach_both_ends_and_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    batch = sample_batch(torch.arange(5), 400, 3, generator)
    assert torch.bincount(batch[:, 0]).min() > 90  # uniform over the three offsets
    assert set(batch[:, 0].tolist()) == {0, 1, 2}
    assert torch.equal(torch.get_rng_state(), state)
    whole = sample_batch(torch.arange(5), 2, 5, generator)
    assert whole.tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("length", [0, 6])
def test_a_window_that_does_not_fit_is_an_error(length: int) -> None:
    stream = torch.arange(5)
    with pytest.raises(DataError, match=str(length)):
        windows(stream, length)
    with pytest.raises(DataError, match=str(length)):
        sample_batch(stream, 2, length, torch.Generator())


def test_wrong_limits_and_shapes_are_errors() -> None:
    with pytest.raises(DataError, match="limit of windows is 0"):
        windows(torch.arange(5), 2, limit=0)
    with pytest.raises(DataError, match=r"shape \(1, 5\)"):
        windows(torch.arange(5)[None], 2)
    with pytest.raises(DataError, match="batch size is 0"):
        sample_batch(torch.arange(5), 0, 2, torch.Generator())


@given(st.lists(st.integers(0, 6), max_size=40))
def test_histograms_count_every_token(ids: list[int]) -> None:
    counts = token_histogram(torch.tensor(ids, dtype=torch.long), 7)
    assert counts.tolist() == [ids.count(token) for token in range(7)]


def test_a_token_outside_the_vocabulary_is_an_error() -> None:
    with pytest.raises(DataError, match="from 0 to 4, but the vocabulary has 4"):
        token_histogram(torch.arange(5), 4)


def test_the_fingerprint_follows_ids_and_not_padding(byte_tokenizer: Any) -> None:
    first, second = word_tokenizer(), word_tokenizer()
    second.backend_tokenizer.enable_padding(length=9)
    second.backend_tokenizer.enable_truncation(5)
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(second)
    other = word_tokenizer("one three two")
    assert tokenizer_fingerprint(first) != tokenizer_fingerprint(other)
    before = tokenizer_fingerprint(byte_tokenizer)
    byte_tokenizer.eos_token_id = 0
    assert tokenizer_fingerprint(byte_tokenizer) != before
