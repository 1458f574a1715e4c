"""Instruction data: both formats, hold-out by category, documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from samv2.common.errors import DataError
from samv2.common.prompting import InstructionRow, Prompter
from samv2.data.allocation import split_shards
from samv2.data.instructions import (
    categories,
    documents_by_category,
    hold_out,
    load_instructions,
    to_documents,
)

ALPACA = {"instruction": "Add.", "input": "1, 2", "output": "3"}
DOLLY = {
    "instruction": "Name it.",
    "context": "",
    "response": "Tea",
    "category": "open_qa",
}


def rows_of(**counts: int) -> list[InstructionRow]:
    return [
        InstructionRow(instruction=f"{kind} {i}", response="r", category=kind)
        for kind, count in counts.items()
        for i in range(count)
    ]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_both_formats_are_read_from_both_kinds_of_file(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"rows.{suffix}"
    lines = [json.dumps(ALPACA), json.dumps(DOLLY)]
    path.write_text("\n".join(lines) if suffix == "jsonl" else f"[{','.join(lines)}]")
    assert load_instructions(path) == [
        InstructionRow(
            instruction="Add.", input="1, 2", response="3", category="uncategorised"
        ),
        InstructionRow(
            instruction="Name it.", input="", response="Tea", category="open_qa"
        ),
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([ALPACA, {"instruction": "Add."}], "Row 2 .* neither format"),
        ([{**ALPACA, "output": 3}], "Row 1 .* neither format"),
        (["text"], "Row 1 .* neither format"),
        ([], "holds no row"),
        ({"rows": []}, "holds a dict, not a list"),
    ],
)
def test_faults_of_a_file_are_named(tmp_path: Path, content: Any, words: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=words):
        load_instructions(path)


def test_a_file_that_is_missing_or_no_json_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no file"):
        load_instructions(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text(json.dumps(ALPACA) + "\n" + json.dumps(DOLLY))
    with pytest.raises(DataError, match="not JSON .* .jsonl for one object a line"):
        load_instructions(tmp_path / "bad.json")


def test_the_same_number_of_every_category_is_held_out() -> None:
    rows = rows_of(qa=30, summary=12)
    train, heldout = hold_out(rows, seed=5)
    assert categories(heldout) == ["qa"] * 10 + ["summary"] * 10
    assert len(train) == 22 and not set(train) & set(heldout)
    assert [row for row in rows if row in train] == train
    assert hold_out(rows, seed=5) == (train, heldout)
    assert hold_out(rows, seed=6)[1] != heldout


def test_a_category_too_small_to_hold_out_is_an_error() -> None:
    with pytest.raises(DataError, match="'summary' has 10 rows.* 10 are held out"):
        hold_out(rows_of(qa=30, summary=10), seed=0)
    with pytest.raises(DataError, match="per_category is 0"):
        hold_out(rows_of(qa=3), 0, seed=0)


def test_documents_are_prompts_with_responses() -> None:
    prompter = Prompter("alpaca_short")
    row = InstructionRow(instruction="Add.", input="1", response="2", category="math")
    text = "### Instruction:\nAdd.\n\n### Input:\n1\n\n### Response:\n2"
    assert to_documents([row], prompter) == [text]
    assert documents_by_category([row, row], prompter) == {"math": [text, text]}


def test_categories_feed_the_splits() -> None:
    rows = rows_of(qa=20, summary=20, code=20)
    clients = split_shards(categories(rows), 3, seed=0)
    assert sorted(len(items) for items in clients) == [20, 20, 20]
    assert all(len({rows[i].category for i in items}) <= 2 for items in clients)
