"""Prompts: wording, cutting the response out, masked training tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from samv2.common.errors import DataError
from samv2.common.prompting import (
    IGNORED_LABEL,
    TEMPLATES,
    InstructionRow,
    Prompter,
)

ROW = InstructionRow(instruction="Add.", input="1 and 2", response="3")


def test_alpaca_is_worded_as_in_shepherd() -> None:
    assert Prompter("alpaca").prompt("Add.", "1 and 2", "3") == (
        "Below is an instruction that describes a task, paired with an input that "
        "provides further context. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n"
        "### Response:\n3"
    )


def test_an_empty_input_uses_the_template_without_one() -> None:
    prompter = Prompter("alpaca_short")
    expected = "### Instruction:\nAdd.\n\n### Response:\n"
    assert prompter.prompt("Add.") == prompter.prompt("Add.", "") == expected


def test_chat_uses_chatml_turns() -> None:
    assert Prompter("chat").document(ROW) == (
        "<|im_start|>user\nAdd.\n\n1 and 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>"
    )


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("input", ["", "x"])
def test_the_response_comes_back_out(template: str, input: str) -> None:
    prompter = Prompter(template)
    text = prompter.prompt("Say {this} and {0}.", input, "two\n\nlines }{")
    assert prompter.response_of(text) == "two\n\nlines }{"


def test_a_text_without_a_response_is_an_error() -> None:
    with pytest.raises(DataError, match="does not hold '### Response:'"):
        Prompter().response_of("nothing here")


@pytest.mark.parametrize("template", TEMPLATES)
def test_only_the_prompt_is_masked(template: str, byte_tokenizer: Any) -> None:
    prompter = Prompter(template)
    ids, labels = prompter.encode(byte_tokenizer, ROW, max_length=1000)
    prompt = prompter.prompt(ROW.instruction, ROW.input).encode()
    response = [*("3" + prompter.template.response_end).encode(), 256]
    assert ids == [*prompt, *response]
    assert labels == [IGNORED_LABEL] * len(prompt) + response


def test_a_long_response_is_cut_and_the_prompt_is_not(byte_tokenizer: Any) -> None:
    prompter = Prompter("alpaca_short")
    prompt = prompter.prompt(ROW.instruction, ROW.input)
    long = InstructionRow(instruction="Add.", input="1 and 2", response="x" * 99)
    ids, labels = prompter.encode(byte_tokenizer, long, max_length=len(prompt) + 5)
    assert bytes(ids).decode() == prompt + "xxxxx"
    assert labels[-5:] == [ord("x")] * 5


def test_a_prompt_that_leaves_no_room_is_an_error(byte_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="leaves none of 20"):
        Prompter().encode(byte_tokenizer, ROW, max_length=20)


def test_a_tokenizer_without_an_end_is_an_error(byte_tokenizer: Any) -> None:
    byte_tokenizer.eos_token_id = None
    with pytest.raises(DataError, match="eos_token"):
        Prompter().encode(byte_tokenizer, ROW, max_length=1000)


def write_template(path: Path, **changes: Any) -> Path:
    content = {
        "description": "mine",
        "prompt_input": "{instruction} {input} =>",
        "prompt_no_input": "{instruction} =>",
        "response_split": "=>",
        **changes,
    }
    kept = {key: value for key, value in content.items() if value is not ...}
    path.write_text(json.dumps(kept))
    return path


def test_a_template_can_be_a_file(tmp_path: Path) -> None:
    prompter = Prompter(write_template(tmp_path / "mine.json"))
    assert prompter.document(ROW) == "Add. 1 and 2 =>3"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt_input": ...}, "prompt_input is not a string"),
        ({"description": 3}, "description is not a string"),
        ({"prompt_input": "{instruction}"}, "prompt_input holds the placeholders"),
        ({"prompt_no_input": "{input}"}, "prompt_no_input holds the placeholders"),
        ({"prompt_no_input": "{instruction} {"}, "prompt_no_input holds"),
        ({"response_split": ""}, "response_split is empty"),
        ({"colour": "red"}, "colour is unknown"),
    ],
)
def test_faults_of_a_template_are_named(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        Prompter(write_template(tmp_path / "mine.json", **changes))


def test_an_unknown_template_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match="'alpacca'.*alpaca, alpaca_short, dolly, chat"):
        Prompter("alpacca")


@pytest.mark.parametrize(
    ("text", "words"), [("{", "not JSON"), ("[]", "not an object")]
)
def test_a_template_must_be_a_json_object(
    tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(DataError, match=words):
        Prompter(tmp_path / "bad.json")
