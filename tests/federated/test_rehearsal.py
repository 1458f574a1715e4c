"""Rehearsals: who fails and lies when, and what becomes of a run that has them."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from samv2.common.errors import FrameError
from samv2.common.settings import Settings
from samv2.common.settings_checks import ATTACKS
from samv2.common.telemetry import read_metrics
from samv2.federated import rehearsal_mod
from samv2.federated.client_round import RoundRequest
from samv2.federated.graph_message import GraphMessage
from samv2.federated.grid import (
    EmbeddedGrid,
    reply_from_record,
    reply_to_record,
    request_to_record,
)
from samv2.federated.rehearsal import (
    FAULTS,
    POISON,
    attack_of,
    fault_of,
    hostile_clients,
    warning,
)
from samv2.federated.rehearsal_mod import npy_bomb, npz_bomb, tampered
from samv2.federated.server_app import run_embedded
from samv2.federated.validate import validate_reply
from samv2.updates.packing import unpack
from tests.federated.runs import (
    assert_same_bits,
    checkpoint_tensors,
    quiet,
    small_settings,
    toy_manifest,
    toy_reply,
    toy_settings,
    toy_state,
)

pytestmark = [pytest.mark.faults, pytest.mark.hostile]

MALFORMED = tuple(name for name in ATTACKS if name not in POISON)
ALL = toy_settings(
    "rehearsal.fail=0.3", "rehearsal.hostile=0.2", "federation.clients=10"
)


def test_faults_repeat_and_come_as_often_as_asked() -> None:
    asked = [(r, c, a) for r in range(1, 21) for c in range(10) for a in (0, 1)]
    found = [fault_of(ALL, *item) for item in asked]
    assert found == [fault_of(ALL, *item) for item in asked]
    assert 0.24 < sum(fault is not None for fault in found) / len(found) < 0.36
    assert {fault for fault in found if fault} == set(FAULTS)
    assert found[::2] != found[1::2]  # a second attempt can succeed
    other = dataclasses.replace(ALL, seed=1)
    assert found != [fault_of(other, *item) for item in asked]
    assert {fault_of(toy_settings(), *item) for item in asked} == {None}


def test_the_hostile_are_the_same_clients_all_along_and_do_everything() -> None:
    hostile = hostile_clients(ALL)
    assert len(hostile) == 2 and set(hostile) <= set(range(10))
    for client in range(10):
        sent = {attack_of(ALL, round, client) for round in range(1, 1 + len(ATTACKS))}
        assert sent == (set(ATTACKS) if client in hostile else {None})
    few = toy_settings("rehearsal.hostile=0.01", "federation.clients=4")
    assert len(hostile_clients(few)) == 1
    assert hostile_clients(toy_settings()) == ()


def test_no_two_rounds_in_a_row_are_well_formed() -> None:
    """So every hostile client is named in a run of two rounds or more."""
    for first, second in zip(ATTACKS, ATTACKS[1:] + ATTACKS[:1]):
        assert not (first in POISON and second in POISON)


def test_a_rehearsal_says_that_it_is_one() -> None:
    text = warning(ALL)
    assert text is not None and text.startswith("REHEARSAL: 30% of training requests")
    assert all(str(client) in text for client in hostile_clients(ALL))
    assert warning(toy_settings()) is None


def judged(attack: str) -> str | None:
    """Why the validator refuses a toy reply after an attack; None where it does not."""
    content = tampered(
        attack, reply_to_record(toy_reply()), 1, toy_manifest(), toy_settings()
    )
    try:
        reply = reply_from_record(content)
        validate_reply(reply, 0, toy_state(), toy_manifest(), toy_settings())
    except FrameError as error:
        return error.reason
    return None


def test_every_attack_is_what_it_is_called() -> None:
    assert {attack: judged(attack) for attack in ATTACKS} == {
        "nan": "nonfinite",
        "inf": "nonfinite",
        "sign_flip": None,
        "scale": None,
        "huge_examples": None,
        "foreign_keys": None,
        "negative_examples": "examples",
        "zero_examples": "examples",
        "float_examples": "reply_shape",
        "stale_round": "round",
        "truncated": "frame_length",
        "bit_flip": "body_hash",
        "garbage": "magic",
        "npy_bomb": "reply_shape",
        "npz_bomb": "reply_shape",
        "wrong_graph": "graph_version",
    }


@pytest.mark.parametrize(("attack", "factor"), [("sign_flip", -1.0), ("scale", 100.0)])
def test_poison_is_the_honest_update_times_a_factor(attack: str, factor: float) -> None:
    settings = toy_settings("federation.codec=raw")
    honest = unpack(toy_reply().update, toy_manifest(), round=1)
    content = tampered(
        attack, reply_to_record(toy_reply()), 1, toy_manifest(), settings
    )
    sent = unpack(reply_from_record(content).update, toy_manifest(), round=1)
    assert_same_bits(
        {str(key): value for key, value in sent.items()},
        {str(key): factor * value for key, value in honest.items()},
    )


def test_bombs_are_bombs_and_cost_the_server_nothing() -> None:
    assert len(npy_bomb()) == 128
    assert np.lib.format.read_magic(file := io.BytesIO(npy_bomb())) == (1, 0)
    assert np.lib.format.read_array_header_1_0(file)[0] == (10**10,)
    bomb = npz_bomb()
    assert len(bomb) < 100_000
    assert np.load(io.BytesIO(bomb))["arr_0"].nbytes == 1 << 25
    tracemalloc.start()
    assert judged("npz_bomb") == judged("npy_bomb") == "reply_shape"
    tracemalloc.reset_peak()
    content = tampered(
        "npy_bomb", reply_to_record(toy_reply()), 1, toy_manifest(), toy_settings()
    )
    with pytest.raises(FrameError):
        reply_from_record(content)
    assert tracemalloc.get_traced_memory()[1] < 40 * (1 << 20)
    tracemalloc.stop()


def app_of(settings: Settings) -> ClientApp:
    """An honest app with a rehearsal around it."""
    mod = rehearsal_mod.rehearsal_mod(
        lambda context: settings,
        lambda context: int(context.node_config["client"]),
        lambda message, context: toy_manifest(),
    )
    app = ClientApp(mods=[mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(reply_to_record(toy_reply()), reply_to=message)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    return app


@pytest.mark.parametrize("fault", FAULTS)
def test_a_client_fails_in_every_way(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal_mod, "fault_of", lambda *_: fault)
    settings = toy_settings("rehearsal.fail=0.5")
    grid = EmbeddedGrid(lambda: app_of(settings), [{"client": 0}], {})
    request = RoundRequest(
        round=1, graph=GraphMessage(version=0, full=None, edits=()), parameters=b""
    )
    (reply,) = grid.send_and_receive(
        [grid.create_message(request_to_record(request), "train", 100, "1")]
    )
    words = {"silence": "no reply", "error": "rehearsal: an error"}
    assert words.get(fault, f"rehearsal: {fault}") in str(reply.error.reason)
    (reply,) = grid.send_and_receive(
        [grid.create_message(RecordDict(), "query", 100, "1")]
    )
    assert reply.has_content()


ROUNDS = 3
OPTIONS = (
    f"federation.rounds={ROUNDS}",
    "federation.clients=4",
    "federation.eval_windows=1",
    "train.local_steps=1",
    "train.batch_size=2",
    "train.sequence_length=32",
)


def refused(root: Path) -> list[dict[str, Any]]:
    """All refusals of a run."""
    files = [root / f"merge_round{number}.json" for number in range(1, ROUNDS + 1)]
    return [item for file in files for item in json.loads(file.read_text())["refused"]]


def test_a_run_that_rehearses_ends_and_names_the_hostile(
    expert_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = small_settings(
        expert_folder,
        *OPTIONS,
        "rehearsal.fail=0.3",
        "rehearsal.hostile=0.3",
        "seed=3",
    )
    with caplog.at_level(logging.WARNING):
        run_embedded(settings, tmp_path, console=quiet())
    assert any(item.message.startswith("REHEARSAL: 30%") for item in caplog.records)
    rows = read_metrics(tmp_path)
    assert [row["round"] for row in rows] == [1, 2, 3]
    blamed = {
        item["client"] for item in refused(tmp_path) if item["reason"] != "client_error"
    }
    assert set(hostile_clients(settings)) <= blamed
    again = tmp_path / "again"
    run_embedded(settings, again, console=quiet())
    assert_same_bits(
        checkpoint_tensors(tmp_path, ROUNDS), checkpoint_tensors(again, ROUNDS)
    )
    assert refused(tmp_path) == refused(again)


def test_malformed_replies_leave_the_bits_of_a_run_without_them(
    expert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small_settings(
        expert_folder,
        *OPTIONS,
        "federation.retries=0",
        "rehearsal.hostile=0.5",
        f"rehearsal.attacks={','.join(MALFORMED)}",
    )
    run_embedded(settings, tmp_path / "lying", console=quiet())
    names = [(item["client"], item["reason"]) for item in refused(tmp_path / "lying")]
    assert len(names) == 2 * ROUNDS
    assert {client for client, _ in names} == set(hostile_clients(settings))
    assert "client_error" not in {reason for _, reason in names}

    def silent(*_: Any) -> RecordDict:
        raise RuntimeError("this client never replies")

    monkeypatch.setattr(rehearsal_mod, "tampered", silent)
    run_embedded(settings, tmp_path / "silent", console=quiet())
    reasons = {item["reason"] for item in refused(tmp_path / "silent")}
    assert reasons == {"client_error"}
    assert_same_bits(
        checkpoint_tensors(tmp_path / "lying", ROUNDS),
        checkpoint_tensors(tmp_path / "silent", ROUNDS),
    )
