"""Schedules of change: read, refused, dealt to clients, kept on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from samv2.common.errors import DataError
from samv2.data.corpus import Corpus
from samv2.data.drift import Drift, drift_specs, give_later, parse_drifts
from samv2.data.shards import build_federated_text, load_client, save_federated_text
from samv2.data.tokens import tokenize_documents

WINDOW = 64


def test_a_schedule_is_read_in_order_of_rounds() -> None:
    drifts = parse_drifts(["6:2+0-1=math", "3:1=own=texts/a=b"], 3)
    assert drifts == (
        Drift(round=3, clients=(1,), domain="own=texts/a=b"),
        Drift(round=6, clients=(0, 1, 2), domain="math"),
    )
    assert [drift.name for drift in drifts] == ["own", "math"]
    assert drift_specs(["math", "legal"], drifts) == ["own=texts/a=b"]
    assert parse_drifts([], 3) == ()


@pytest.mark.parametrize(
    "entries, message",
    [
        (["6:0"], "holds '6:0'; write ROUND:CLIENTS=DOMAIN"),
        (["6:0--2=math"], "write ROUND:CLIENTS=DOMAIN"),
        (["1:0=math"], "text can change from round 2 on"),
        (["4:2-1=math"], "a span of clients must rise"),
        (["4:3=math"], "names client 3, but there are 3; use 0 to 2"),
        (["4:0=mth"], "no domain 'mth'"),
        (["4:0=math", "4:0-1=cpp"], "changes client 0 twice in round 4"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(entries: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_drifts(entries, 3)


def drifting(corpus: Corpus, tokenizer: Any, **changes: Any) -> Any:
    """Three clients of three domains; two of them turn to a fourth in round 4."""
    start = Corpus(
        domains={n: corpus.domains[n] for n in ("law", "news", "code")}, seed=3
    )
    drift = Drift(round=4, clients=(0, 2), domain="chat=/nowhere")
    return build_federated_text(
        start,
        tokenizer,
        num_clients=3,
        heldout_window=WINDOW,
        drifts=[drift, Drift(round=6, clients=(0,), domain="news=/nowhere")],
        coming={"chat": corpus.domains["chat"]},
        seed=1,
        **changes,
    )


def test_text_changes_with_the_round(small_corpus: Corpus, byte_tokenizer: Any) -> None:
    text = drifting(small_corpus, byte_tokenizer)
    first, second, third = text.clients
    assert second.later == {} and second.at(9) is second
    assert first.at(3) is first and list(first.heldout) == ["law"]
    assert list(first.at(4).heldout) == list(third.at(5).heldout) == ["chat"]
    assert list(first.at(6).heldout) == list(first.at(60).heldout) == ["news"]
    chat = small_corpus.domains["chat"]
    for part, streams in (
        ("train", [first.at(4).train, third.at(4).train]),
        ("heldout", [first.at(4).heldout["chat"], third.at(4).heldout["chat"]]),
    ):
        whole = tokenize_documents(byte_tokenizer, chat.part(part))
        assert torch.equal(torch.cat(streams), whole)
    assert len(first.at(4).heldout["chat"]) % WINDOW == 0
    assert text.index.domains == ("law", "news", "code")
    assert set(text.calibration) == {"law", "news", "code"}


def test_later_text_survives_the_disk(
    small_corpus: Corpus, byte_tokenizer: Any, tmp_path: Path
) -> None:
    text = drifting(small_corpus, byte_tokenizer)
    save_federated_text(text, tmp_path)
    loaded = load_client(tmp_path, 0)
    assert list(loaded.later) == [4, 6] and list(loaded.heldout) == ["law"]
    for round in (1, 4, 6):
        before, after = text.clients[0].at(round), loaded.at(round)
        assert torch.equal(before.train, after.train)
        assert before.heldout.keys() == after.heldout.keys()
        for name, stream in before.heldout.items():
            assert torch.equal(stream, after.heldout[name])


def test_text_that_is_missing_or_short_is_refused(
    small_corpus: Corpus, byte_tokenizer: Any
) -> None:
    with pytest.raises(DataError, match="'chat' has .* for the 2 clients that drift"):
        drifting(small_corpus, byte_tokenizer, min_train_tokens=10_000)
    with pytest.raises(DataError, match="brings the domain 'chat', whose text could"):
        give_later(
            drifting(small_corpus, byte_tokenizer).clients,
            {},
            byte_tokenizer,
            [Drift(round=2, clients=(0,), domain="chat=/nowhere")],
            heldout_window=WINDOW,
            min_train_tokens=1,
        )
