"""``samv2 generate`` as it is used: prompts, files, side by side, a terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from samv2.cli import main

SHORT = ("--max-new-tokens", "6")


def said(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    """What the command printed."""
    capsys.readouterr()
    assert main(["generate", *arguments]) == status
    printed = capsys.readouterr()
    return printed.err if status else printed.out


def test_prompts_from_line_and_file_as_json(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("class Parser\n\nimport os\n")
    options = ("--file", str(tmp_path / "prompts.txt"), "--json", "--side-by-side")
    found = json.loads(said(capsys, str(run_folder), "def run", *options, *SHORT))
    assert "after round 1" in found["name"]
    assert [item["prompt"] for item in found["answers"]] == [
        "def run",
        "class Parser",
        "import os",
    ]
    for item in found["answers"]:
        assert list(item["models"]) == ["dense model", "expert graph"]
        for answer in item["models"].values():
            assert 0 < answer["tokens"] <= 6 and answer["text"]
    alone = json.loads(said(capsys, str(run_folder), "def run", "--json", *SHORT))
    assert list(alone["answers"][0]["models"]) == ["expert graph"]
    text = alone["answers"][0]["models"]["expert graph"]["text"]
    assert text == found["answers"][0]["models"]["expert graph"]["text"]
    shown = said(capsys, str(run_folder), "def run", *SHORT)
    assert shown == f"def run{text}\n"
    table = said(capsys, str(run_folder), "def run", "--side-by-side", *SHORT)
    assert "dense model" in table and "expert graph" in table and "tokens/s" in table


def test_k_seed_and_temperature_matter(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hot = ("def run", "--temperature", "1.5", "--max-new-tokens", "20")
    one, same, other = (
        said(capsys, str(run_folder), *hot, "--seed", seed) for seed in ("1", "1", "2")
    )
    assert one == same != other
    found = said(capsys, str(run_folder), "x", "--experts", "9", status=2)
    assert "9" in found and "1..8" in found


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Standard input that says it is a terminal."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setattr("sys.stdin", stream)
    return stream


def test_a_terminal_is_asked_until_an_empty_line(
    tiny_bootstrapped: Path,
    terminal: io.StringIO,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = said(capsys, str(tiny_bootstrapped), "def run", *SHORT)
    for ending in ("\nnever\n", ""):
        terminal.seek(0)
        terminal.truncate()
        terminal.write(f"def run\nimport\n{ending}")
        terminal.seek(0)
        shown = said(capsys, str(tiny_bootstrapped), *SHORT)
        assert shown.count("> ") == 3
        assert expected.removeprefix("def run") in shown


def test_a_conversation_is_remembered(
    tiny_llama_folder: Path,
    tmp_path: Path,
    terminal: io.StringIO,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "chatty"
    AutoModelForCausalLM.from_pretrained(tiny_llama_folder).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    tokenizer.save_pretrained(folder)
    seen: list[int] = []
    from samv2.federated import generation

    original = generation.chat_ids

    def spy(tokenizer: object, messages: list[dict[str, str]]) -> object:
        seen.append(len(messages))
        return original(tokenizer, messages)

    monkeypatch.setattr(generation, "chat_ids", spy)
    terminal.write("one\ntwo\n\n")
    terminal.seek(0)
    said(capsys, str(folder), "--chat", *SHORT)
    assert seen == [1, 1, 3]
    seen.clear()
    said(capsys, str(folder), "one", "two", "--chat", *SHORT)
    assert seen == [1, 1, 1]


def test_what_cannot_be_written(
    run_folder: Path,
    tiny_llama_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    found = said(capsys, str(run_folder), status=2)
    assert "no terminal to ask" in found and "--file" in found
    found = said(capsys, str(run_folder), "x", "--chat", status=2)
    assert "chat template" in found
    found = said(capsys, str(run_folder), "x", "--max-new-tokens", "0", status=2)
    assert "--max-new-tokens is 0" in found
    found = said(capsys, str(tiny_llama_folder), "x", "--side-by-side", status=2)
    assert "no experts" in found
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    for name, word in (("empty", "no prompt"), ("binary", "UTF-8")):
        file = str(tmp_path / f"{name}.txt")
        assert word in said(capsys, str(run_folder), "--file", file, status=2)
