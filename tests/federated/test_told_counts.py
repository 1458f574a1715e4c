"""What a client has told of its text, by round, and what it compares with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from samv2.common.errors import CheckpointError
from samv2.data.shard_types import LaterText
from samv2.data.shards import ClientShard
from samv2.federated.drift import distance
from samv2.federated.siblings import unpack_counts
from samv2.federated.told_counts import KEEP, load_counts, tell_counts, text_moved


@pytest.fixture
def shard() -> ClientShard:
    """A client whose text changes in round 3."""
    later = LaterText(train=torch.arange(1000, 2000), heldout={})
    return ClientShard(
        index=0,
        train=torch.arange(1000),
        heldout={},
        category_counts={},
        description="",
        tokenizer_fingerprint="",
        later={3: later},
    )


def names(folder: Path) -> list[int]:
    """Rounds of the files."""
    return sorted(int(path.stem.removeprefix("counts_")) for path in folder.iterdir())


def test_a_client_remembers_what_it_told_in_each_round(
    tmp_path: Path, shard: ClientShard
) -> None:
    assert load_counts(tmp_path, round=1) is None
    told = unpack_counts(tell_counts(tmp_path, shard, round=1))
    later = unpack_counts(tell_counts(tmp_path, shard, round=3))
    for number, counts_N in ((1, told), (3, later)):
        kept_N = load_counts(tmp_path, round=number)
        assert kept_N is not None and distance(kept_N, counts_N) < 0.01
    assert distance(told, later) > 0.9


def test_a_client_compares_with_what_the_server_goes_by(
    tmp_path: Path, shard: ClientShard
) -> None:
    tell_counts(tmp_path, shard, round=1)
    assert text_moved(tmp_path, shard, round=2, told=1) == pytest.approx(0, abs=1e-3)
    tell_counts(tmp_path, shard, round=3)  # the answer is lost
    assert text_moved(tmp_path, shard, round=4, told=1) == 1
    assert text_moved(tmp_path, shard, round=4, told=3) == pytest.approx(0, abs=1e-3)
    assert text_moved(tmp_path, shard, round=4, told=0) == 1
    # In a new folder, what the shard says the text was.
    assert text_moved(tmp_path / "new", shard, round=4, told=1) == 1


def test_files_that_cannot_be_named_any_more_are_removed(
    tmp_path: Path, shard: ClientShard
) -> None:
    (tmp_path / "counts.safetensors").write_bytes(b"of an earlier version")
    for number in range(1, 10):
        tell_counts(tmp_path, shard, round=number)
    text_moved(tmp_path, shard, round=10, told=6)
    assert names(tmp_path) == [*range(7 - KEEP, 7), 9]


def test_a_damaged_file_names_itself_and_the_remedy(
    tmp_path: Path, shard: ClientShard
) -> None:
    (tmp_path / "counts_0001.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="damaged.*remove the file"):
        text_moved(tmp_path, shard, round=2, told=1)
