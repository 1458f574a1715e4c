"""Frames that wait in files are the frames that came."""

from __future__ import annotations

from pathlib import Path

from samv2.federated.spool import Spool
from samv2.federated.validate import validate_reply
from samv2.updates.stored import read_frame
from tests.federated.runs import toy_manifest, toy_reply, toy_settings, toy_state


def test_frames_wait_in_files_until_the_round_is_over(tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    folder.mkdir()
    (folder / "client_000007.bin").write_bytes(b"of a killed server")
    spool = Spool(folder)
    assert not folder.exists()
    reply = validate_reply(toy_reply(), 3, toy_state(), toy_manifest(), toy_settings())
    kept = spool.keep(reply)
    assert kept.contribution.data == folder / "client_000003.bin"
    assert read_frame(kept.contribution.data) == toy_reply().update
    assert read_frame(kept.usage) == toy_reply().usage
    assert kept.contribution.weight == reply.contribution.weight
    spool.empty()
    assert not folder.exists()


def test_without_a_folder_frames_stay_in_memory() -> None:
    reply = validate_reply(toy_reply(), 3, toy_state(), toy_manifest(), toy_settings())
    assert Spool(None).keep(reply) == reply
