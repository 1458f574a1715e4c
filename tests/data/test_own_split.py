"""Folders of text that come with their own split."""

from __future__ import annotations

from pathlib import Path

import pytest

from samv2.common.errors import DataError
from samv2.data.corpus import PartSizes, build_corpus
from samv2.data.sources import domain_identity
from samv2.data.user_text import own_split, read_own_split
from samv2.federated.evaluation import read_own_texts

REPEATED = "a line that is long enough to count as one, and that stands twice here\n"


def write(folder: Path, **texts: str) -> Path:
    """A folder with one .txt file a keyword."""
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def test_a_split_is_kept_to_the_letter(tmp_path: Path) -> None:
    train = REPEATED * 2 + "\n\n\n\n  trained on \n"
    folder = write(
        tmp_path / "own", train=train, heldout=REPEATED, calibration=" ours\n"
    )
    corpus = build_corpus([f"own={folder}"], cache=tmp_path, seed=3)
    domain = corpus.domains["own"]
    assert domain.train == (train,)
    assert domain.heldout == (REPEATED,)
    assert domain.calibration == (" ours\n",)
    assert not (tmp_path / "corpora").exists()


def test_calibration_text_is_the_head_of_the_train_text(tmp_path: Path) -> None:
    folder = write(tmp_path / "own", train="é" * 30, heldout="held")
    sizes = PartSizes(calibration_bytes=21)
    corpus = build_corpus([f"own={folder}"], cache=tmp_path, seed=0, sizes=sizes)
    domain = corpus.domains["own"]
    assert domain.calibration == ("é" * 10,)  # a character is not cut
    assert domain.train == ("é" * 20,)
    files = own_split(folder)
    assert files is not None
    assert read_own_split(files, 0)["calibration"] == ()


def test_other_folders_have_no_split_of_their_own(tmp_path: Path) -> None:
    assert own_split(write(tmp_path / "plain", train="a", notes="b")) is None
    assert own_split(tmp_path / "none.txt") is None


def test_the_identity_follows_the_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "own", train="one", heldout="two")
    before = domain_identity(f"own={folder}")
    write(folder, heldout="three")
    assert domain_identity(f"own={folder}") != before


def test_an_evaluation_reads_the_held_out_part(tmp_path: Path) -> None:
    folder = write(tmp_path / "own", train="trained on", heldout="kept\n\nback")
    assert read_own_texts([f"own={folder}"]) == {"own": ["kept\n\nback"]}


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"heldout": "a"}, "heldout.txt but no train.txt"),
        ({"train": "a", "heldout": "b", "notes": "c"}, "also holds notes.txt"),
        ({"train": "a" * 9, "heldout": " \n"}, "heldout.txt holds no text"),
        ({"train": "a" * 9, "heldout": "b"}, "has 9 bytes, all of which calibration"),
        (
            {"train": "a", "heldout": "b", "calibration": ""},
            "calibration.txt holds no text",
        ),
    ],
)
def test_faults_of_a_split_are_named(
    tmp_path: Path, texts: dict[str, str], words: str
) -> None:
    folder = write(tmp_path / "own", **texts)
    with pytest.raises(DataError, match=words):
        build_corpus([f"own={folder}"], cache=tmp_path, seed=0)


def test_a_split_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "own", train="a", heldout="b")
    (folder / "train.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="train.txt is not UTF-8"):
        build_corpus([f"own={folder}"], cache=tmp_path, seed=0)
