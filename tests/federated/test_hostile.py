"""The real strategy against hostile replies: each costs itself and nothing else."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord

from samv2.federated.grid import FRAME_STYPE
from samv2.federated.refusals import TooFewReplies
from samv2.federated.rehearsal_mod import npy_bomb, npz_bomb
from samv2.federated.run_logs import metrics_row
from samv2.federated.usage import pack_usage
from samv2.updates.packing import Manifest, pack
from tests.federated.runs import assert_same_bits, toy_counts, toy_manifest
from tests.federated.toy_federation import (
    ATTACKER,
    CLIENTS,
    FOREIGN,
    Federation,
    Tamper,
    altered,
    arrays,
    empty,
    failure,
    from_elsewhere,
    honest_frame,
    huge,
    metric,
    of_kind,
    silence,
)

pytestmark = pytest.mark.hostile

SMALLER = Manifest.of({key: torch.zeros(5) for key in range(9)})
FEWER = Manifest.of({0: torch.zeros(6)})
SINGLE = Manifest.of({key: torch.zeros(1) for key in range(9)})
PICKLED = pickle.dumps(np.array([{"an": "object"}], dtype=object)) + bytes(100)


def foreign(data: bytes) -> Callable[[dict[str, Array]], None]:
    """Numpy's bytes where a frame belongs."""
    array = Array(dtype="float32", shape=(1,), stype="numpy.ndarray", data=data)
    return lambda held: held.update(update=array)


ATTACKS: dict[str, tuple[Tamper, str]] = {
    "truncated frame": (altered(update=honest_frame()[:-3]), "frame_length"),
    "empty frame": (altered(update=b""), "truncated"),
    "garbage frame": (altered(update=b"\xff" * 300), "magic"),
    "flipped bit": (altered(update=honest_frame()[:-8] + bytes(8)), "body_hash"),
    "nan values": (altered(update=huge(torch.full((6,), torch.nan))), "nonfinite"),
    "inf values": (altered(update=huge(torch.full((6,), torch.inf))), "nonfinite"),
    "huge values": (altered(update=huge(torch.full((6,), 1e30))), "update_range"),
    "wrong shape": (
        altered(update=pack({0: torch.ones(5)}, SMALLER, round=1)),
        "fingerprint",
    ),
    "fewer tensors": (
        altered(update=pack({0: torch.ones(6)}, FEWER, round=1)),
        "fingerprint",
    ),
    "no experts": (altered(update=pack({}, toy_manifest(), round=1)), "empty_update"),
    "oversized update": (altered(update=bytes(5000)), "budget"),
    "stale round": (altered(update=honest_frame(0)), "round"),
    "future round": (altered(update=honest_frame(2)), "round"),
    "stale usage": (altered(usage=pack_usage(toy_counts(), round=3)), "round"),
    "boastful usage": (
        altered(usage=pack_usage(toy_counts(1, 4000), round=1)),
        "usage_range",
    ),
    "boastful layer": (
        altered(usage=pack_usage(toy_counts(1, 60), round=1)),
        "usage_range",
    ),
    "wrong graph version": (altered(graph_version=4), "graph_version"),
    "no examples": (altered(examples=0), "examples"),
    "negative examples": (altered(examples=-5), "examples"),
    "float examples": (metric(examples=2.5), "reply_shape"),
    "nan examples": (metric(examples=float("nan")), "reply_shape"),
    "bool examples": (metric(examples=True), "reply_shape"),
    "text examples": (metric(examples="8"), "reply_shape"),
    "endless examples": (metric(examples=10**5000), "reply_shape"),
    "no examples key": (metric(examples=None), "reply_shape"),
    "huge tokens": (altered(tokens=10**12), "tokens"),
    "nan loss": (altered(train_loss=float("nan")), "train_loss"),
    "huge loss": (altered(train_loss=1e308), "train_loss"),
    "endless loss": (metric(train_loss=10**400), "reply_shape"),
    "missing update": (arrays(lambda held: held.pop("update")), "reply_shape"),
    "missing usage": (arrays(lambda held: held.pop("usage")), "reply_shape"),
    "wrong stype": (arrays(lambda held: held.update(update=FOREIGN)), "reply_shape"),
    "header bomb": (arrays(foreign(npy_bomb())), "reply_shape"),
    "zip bomb": (arrays(foreign(npz_bomb())), "reply_shape"),
    "pickled array": (arrays(foreign(PICKLED)), "reply_shape"),
    "header bomb as frame": (altered(update=npy_bomb()), "magic"),
    "zip bomb as frame": (altered(update=npz_bomb()[:4000]), "magic"),
    "pickle as frame": (altered(update=PICKLED), "magic"),
    "broadcast shape": (
        altered(update=pack({0: torch.ones(1)}, SINGLE, round=1)),
        "fingerprint",
    ),
    "numbers as payload": (
        of_kind("payload", MetricRecord({"update": 1})),
        "reply_shape",
    ),
    "bytes as payload": (
        of_kind("payload", ConfigRecord({"update": b"x", "usage": b"y"})),
        "reply_shape",
    ),
    "arrays as metrics": (
        of_kind("metrics", ArrayRecord({"graph-version": FOREIGN})),
        "reply_shape",
    ),
    "no records": (empty, "reply_shape"),
    "error": (failure("RuntimeError: out of memory\nTraceback"), "client_error"),
    "error without words": (failure(" \n "), "client_error"),
    "flooding error": (failure("\x1b[31mred\n" * 100_000), "client_error"),
    "no reply": (silence, "no_reply"),
}


@pytest.fixture(scope="module")
def without_attacker(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """The round as it is when the attacker says nothing."""
    federation = Federation(tmp_path_factory.mktemp("honest"))
    federation.run(silence)
    return federation


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_with_its_reason_and_changes_no_bit(
    tmp_path: Path, without_attacker: Federation, name: str
) -> None:
    tamper, reason = ATTACKS[name]
    federation = Federation(tmp_path)
    federation.run(tamper)
    refused = federation.refused()
    assert [(item["client"], item["reason"]) for item in refused] == [
        (ATTACKER, reason)
    ]
    detail = refused[0]["detail"]
    assert 0 < len(detail) <= 2000
    assert all(letter.isprintable() or letter == "\n" for letter in detail)
    assert_same_bits(federation.tensors(), without_attacker.tensors())
    row = metrics_row(federation.reports[0])
    assert (row["clients"], row["refused"]) == (CLIENTS - 1, 1)
    assert row["perplexity"] == {"python": pytest.approx(7.389, abs=1e-3)}


def test_foreign_keys_in_a_reply_are_not_read(tmp_path: Path) -> None:
    honest, other = Federation(tmp_path / "a"), Federation(tmp_path / "b")
    honest.run()
    other.run(arrays(lambda held: held.update(evil=FOREIGN)))
    assert other.refused() == []
    assert_same_bits(honest.tensors(), other.tensors())


def test_a_reply_of_an_unasked_node_is_refused(
    tmp_path: Path, without_attacker: Federation
) -> None:
    federation = Federation(tmp_path)
    federation.run(from_elsewhere)
    found = [(item["client"], item["reason"]) for item in federation.refused()]
    assert found == [(-1, "unasked"), (ATTACKER, "no_reply")]
    assert "999" in federation.refused()[0]["detail"]
    assert_same_bits(federation.tensors(), without_attacker.tensors())


def test_a_second_reply_of_a_node_is_refused(tmp_path: Path) -> None:
    honest, federation = Federation(tmp_path / "a"), Federation(tmp_path / "b")
    honest.run()
    federation.run(lambda request, reply: [reply, *altered(examples=3)(request, reply)])
    found = [(item["client"], item["reason"]) for item in federation.refused()]
    assert found == [(ATTACKER, "duplicate")]
    assert_same_bits(federation.tensors(), honest.tensors())


def test_huge_example_counts_are_capped(tmp_path: Path) -> None:
    few, many = (
        Federation(tmp_path / name, "federation.max_examples=5") for name in "ab"
    )
    few.run(altered(examples=5))
    many.run(altered(examples=2**62))
    assert many.refused() == []
    assert_same_bits(few.tensors(), many.tensors())


def test_a_claim_of_many_examples_weighs_as_much_as_a_round_holds(
    tmp_path: Path,
) -> None:
    most, many = Federation(tmp_path / "a"), Federation(tmp_path / "b")
    train = most.settings.train
    most.run(altered(examples=train.local_steps * train.batch_size))
    many.run(altered(examples=2**62))
    assert many.refused() == []
    assert_same_bits(most.tensors(), many.tensors())


def test_zeros_do_not_hold_back_the_other_sender_of_an_expert(tmp_path: Path) -> None:
    ones = {1: torch.ones(6)}
    tensors = []
    for name, blocks in (("zeros", {0: torch.zeros(6)} | ones), ("without", ones)):
        frame = pack(blocks, toy_manifest(), round=1)
        federation = Federation(tmp_path / name, "aggregation.rule=median", clients=2)
        federation.run(altered(update=frame))
        assert federation.refused() == []
        tensors.append(federation.tensors())
    assert_same_bits(*tensors)
    assert bool(tensors[0]["0"].any())


def test_all_hostile_at_once_fail_the_round_and_change_nothing(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    federation.grid.attackers = tuple(range(CLIENTS))
    with pytest.raises(TooFewReplies, match=r"round 1 had 0 valid.*\[nonfinite\]"):
        federation.run(altered(update=huge(torch.full((6,), torch.nan))))
    assert federation.strategy.state is federation.states[0]
    assert not (tmp_path / "merge_round1.json").exists()


def test_no_client_with_examples_is_too_few_replies(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    federation.grid.attackers = tuple(range(CLIENTS))
    with pytest.raises(TooFewReplies, match=r"\[examples\]"):
        federation.run(altered(examples=0))
    assert federation.strategy.state is federation.states[0]


def test_a_declared_shape_is_not_believed(tmp_path: Path) -> None:
    """The bytes are read by the frame's own length; the array's shape says nothing."""
    honest, other = Federation(tmp_path / "a"), Federation(tmp_path / "b")
    honest.run()

    def lies(held: dict[str, Array]) -> None:
        data = held["update"].data
        held["update"] = Array("uint8", (10**10,), FRAME_STYPE, data)

    other.run(arrays(lies))
    assert other.refused() == []
    assert_same_bits(honest.tensors(), other.tensors())


def test_a_hostile_client_is_put_in_quarantine(tmp_path: Path) -> None:
    federation = Federation(
        tmp_path, "federation.rounds=5", "federation.quarantine=2", "edits.rho_max=0"
    )
    federation.run(altered(examples=0), rounds=(1, 3))
    found = [bool(federation.refused(number)) for number in range(1, 6)]
    assert found == [True, False, True, False, False]
    asked = [number for number, client, _ in federation.masks if client == ATTACKER]
    assert asked == [1, 2, 3]
    assert federation.strategy.memory()["hostile"] == {str(ATTACKER): 2}
    again = Federation(tmp_path / "again", "federation.quarantine=2")
    again.strategy.recall(federation.strategy.memory())
    again.run()
    assert {client for _, client, _ in again.masks} == {0, 2}


def test_errors_and_silence_are_not_hostile(tmp_path: Path) -> None:
    federation = Federation(tmp_path, "federation.rounds=3", "federation.quarantine=1")
    federation.run(failure("ValueError: no memory"), rounds=(1, 2))
    assert [bool(federation.refused(n)) for n in (1, 2, 3)] == [True, True, False]
    assert federation.strategy.memory()["hostile"] == {}


def test_everybody_in_quarantine_ends_the_run_cleanly(tmp_path: Path) -> None:
    federation = Federation(tmp_path, "federation.quarantine=1")
    federation.grid.attackers = tuple(range(CLIENTS))
    with pytest.raises(TooFewReplies, match="had 0 valid replies"):
        federation.run(altered(tokens=0))
    assert federation.grid.asked == CLIENTS
