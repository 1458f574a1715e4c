"""Client shards: every token in one place, the same after a round trip to disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from samv2.common.errors import DataError
from samv2.data.corpus import Corpus, PartSizes, corpus_from_documents
from samv2.data.shards import (
    SPLITS,
    FederatedText,
    build_federated_text,
    load_calibration,
    load_client,
    load_federated_text,
    load_index,
    save_federated_text,
)
from samv2.data.tokens import tokenize_documents, windows


def documents_of(stream: torch.Tensor) -> list[str]:
    """Undo the byte tokenizer."""
    pieces: list[bytearray] = [bytearray()]
    for token in stream.tolist():
        if token == 256:
            pieces.append(bytearray())
        else:
            pieces[-1].append(token)
    return [piece.decode() for piece in pieces]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("num_clients", [1, 3, 4, 9])
def test_every_train_document_is_at_one_client(
    small_corpus: Corpus, byte_tokenizer: Any, split: str, num_clients: int
) -> None:
    text = build_federated_text(
        small_corpus, byte_tokenizer, num_clients=num_clients, split=split, seed=1
    )
    held = [d for client in text.clients for d in documents_of(client.train)]
    assert sorted(held) == sorted(
        d for domain in small_corpus.domains.values() for d in domain.train
    )
    for client in text.clients:
        names = [d.split()[0] for d in documents_of(client.train)]
        assert client.category_counts == {
            n: names.count(n) for n in dict.fromkeys(names)
        }


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("num_clients", [1, 3, 4, 9])
def test_the_clients_heldout_text_is_the_whole_of_it_once(
    small_corpus: Corpus, byte_tokenizer: Any, split: str, num_clients: int
) -> None:
    text = build_federated_text(
        small_corpus,
        byte_tokenizer,
        num_clients=num_clients,
        split=split,
        seed=1,
        heldout_window=64,
    )
    for name, domain in small_corpus.domains.items():
        whole = tokenize_documents(byte_tokenizer, domain.heldout)
        pieces = [c.heldout[name] for c in text.clients if name in c.heldout]
        assert torch.equal(torch.cat(pieces), whole)
        cut = torch.cat([windows(piece, 64) for piece in pieces])
        assert torch.equal(cut, windows(whole, 64))
        assert max(map(len, pieces)) - min(map(len, pieces)) < 128
        assert all(set(c.heldout) == set(c.category_counts) for c in text.clients)


def test_a_domain_weighs_by_its_text_and_not_by_its_documents(
    byte_tokenizer: Any,
) -> None:
    def words(kind: str, count: int, size: int) -> list[str]:
        return [f"{kind} {i:04} ".ljust(size, "x") for i in range(count)]

    sizes = PartSizes(
        heldout_bytes=1000, calibration_bytes=0, train_bytes=64_000, min_train_bytes=1
    )
    documents = {"tiny": words("tiny", 1400, 50), "long": words("long", 45, 1600)}
    corpus = corpus_from_documents(documents, seed=0, sizes=sizes, templated=True)
    text = build_federated_text(
        corpus, byte_tokenizer, num_clients=4, split="shards", seed=0
    )
    assert max(text.index.train_tokens) < 1.3 * min(text.index.train_tokens)
    assert sum(c.category_counts.get("tiny", 0) for c in text.clients) == 1280
    with pytest.raises(DataError, match="has .* fewer than the 10000"):
        build_federated_text(
            corpus,
            byte_tokenizer,
            num_clients=8,
            split="shards",
            item_bytes=0,
            min_train_tokens=10_000,
            seed=0,
        )


def test_more_holders_than_windows_leaves_the_smallest_without(
    small_corpus: Corpus, byte_tokenizer: Any
) -> None:
    text = build_federated_text(
        small_corpus,
        byte_tokenizer,
        num_clients=9,
        seed=1,
        heldout_window=1500,
    )
    holders = [c.index for c in text.clients if "law" in c.heldout]
    assert holders == [0]
    assert len(text.clients[0].heldout["law"]) > 1990


def test_calibration_text_stays_with_the_server(
    small_corpus: Corpus, byte_tokenizer: Any
) -> None:
    text = build_federated_text(small_corpus, byte_tokenizer, num_clients=4, seed=1)
    for name, stream in text.calibration.items():
        assert documents_of(stream) == list(small_corpus.domains[name].calibration)
    assert set(text.calibration) == set(text.domains)


def test_one_domain_a_client_is_as_unlike_as_can_be(
    small_corpus: Corpus, byte_tokenizer: Any
) -> None:
    text = build_federated_text(small_corpus, byte_tokenizer, num_clients=4, seed=1)
    assert text.index.category_heterogeneity == 1.0
    assert 0.1 < text.index.token_heterogeneity < 1.0
    assert [list(c.category_counts) for c in text.clients] == [
        [name] for name in small_corpus.names
    ]
    count = len(small_corpus.domains["law"].train)
    assert text.clients[0].description == f"client 0: law {count} documents"
    mixed = build_federated_text(
        small_corpus,
        byte_tokenizer,
        num_clients=4,
        split="dirichlet",
        alpha=500.0,
        seed=1,
    )
    assert mixed.index.category_heterogeneity < 0.3
    assert mixed.index.token_heterogeneity < text.index.token_heterogeneity


@pytest.fixture
def saved(small_corpus: Corpus, byte_tokenizer: Any, tmp_path: Path) -> FederatedText:
    """Federated text of three clients that is also in ``tmp_path``."""
    text = build_federated_text(
        small_corpus, byte_tokenizer, num_clients=3, split="dirichlet", seed=1
    )
    save_federated_text(text, tmp_path)
    return text


def assert_equal_streams(
    first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]
) -> None:
    assert set(first) == set(second)
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert all(stream.dtype == torch.long for stream in second.values())


def test_a_round_trip_changes_nothing(saved: FederatedText, tmp_path: Path) -> None:
    loaded = load_federated_text(tmp_path)
    assert loaded.index == saved.index == load_index(tmp_path)
    assert_equal_streams(saved.calibration, load_calibration(tmp_path))
    for before, after in zip(saved.clients, loaded.clients, strict=True):
        assert (
            torch.equal(before.train, after.train) and after.train.dtype == torch.long
        )
        assert_equal_streams(before.heldout, after.heldout)
        assert (before.index, before.category_counts, before.description) == (
            after.index,
            after.category_counts,
            after.description,
        )
    stored = load_file(tmp_path / "client_00000.safetensors")
    assert stored["train"].dtype == torch.int32


def test_a_client_needs_only_its_own_file(saved: FederatedText, tmp_path: Path) -> None:
    for path in tmp_path.iterdir():
        if path.name != "client_00001.safetensors":
            path.unlink()
    assert torch.equal(load_client(tmp_path, 1).train, saved.clients[1].train)
    with pytest.raises(DataError, match="client_00000.safetensors: check the client's"):
        load_client(tmp_path, 0)
    with pytest.raises(DataError, match="not federated text, or writing it was interr"):
        load_index(tmp_path)


def test_saving_fewer_clients_leaves_no_stale_ones(
    saved: FederatedText, small_corpus: Corpus, byte_tokenizer: Any, tmp_path: Path
) -> None:
    text = build_federated_text(small_corpus, byte_tokenizer, num_clients=1, seed=1)
    save_federated_text(text, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "calibration.safetensors",
        "client_00000.safetensors",
        "index.json",
    ]


def test_tokens_of_another_tokenizer_are_refused(
    saved: FederatedText, tmp_path: Path
) -> None:
    fingerprint = saved.tokenizer_fingerprint
    assert load_client(tmp_path, 0, tokenizer_fingerprint=fingerprint).index == 0
    with pytest.raises(DataError, match="build the federated text again"):
        load_client(tmp_path, 0, tokenizer_fingerprint="0" * 64)


@pytest.mark.parametrize("damage", ["short", "other"])
def test_a_damaged_client_file_is_refused(
    saved: FederatedText, tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "client_00000.safetensors"
    other = (tmp_path / "calibration.safetensors").read_bytes()
    path.write_bytes(path.read_bytes()[:-9] if damage == "short" else other)
    with pytest.raises(DataError, match="client_00000.*build the federated text again"):
        load_client(tmp_path, 0)


@pytest.mark.parametrize("change", [{"format": 99}, {"domains": None}, {"more": 1}])
def test_a_damaged_index_is_refused(
    saved: FederatedText, tmp_path: Path, change: dict[str, Any]
) -> None:
    path = tmp_path / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match="build the federated text again"):
        load_index(tmp_path)


def test_impossible_federations_are_errors(
    small_corpus: Corpus, byte_tokenizer: Any
) -> None:
    def build(**settings: Any) -> FederatedText:
        settings = {"num_clients": 2, "seed": 0, **settings}
        return build_federated_text(small_corpus, byte_tokenizer, **settings)

    with pytest.raises(DataError, match="no split 'iid': use one of domain, shards"):
        build(split="iid")
    with pytest.raises(DataError, match="items cannot be divided among 1000 clients"):
        build(num_clients=1000)
    with pytest.raises(DataError, match="Client 0 has .* fewer than the 1000000"):
        build(min_train_tokens=1_000_000)
    with pytest.raises(DataError, match="item_bytes is -1"):
        build(item_bytes=-1)
    with pytest.raises(DataError, match="heldout_window is 0"):
        build(heldout_window=0)
