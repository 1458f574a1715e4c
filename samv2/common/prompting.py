"""Instruction rows → prompts, training tokens with masked prompts, and back.

A template is a JSON file with the keys ``description``, ``prompt_input`` (with
``{instruction}`` and ``{input}``), ``prompt_no_input`` (with ``{instruction}``),
``response_split`` (what stands right before an answer) and ``response_end`` (what
closes an answer, may be empty).
"""

from __future__ import annotations

import json
import string
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from samv2.common.errors import DataError

IGNORED_LABEL = -100
"""Label of a token that the loss leaves out."""

TEMPLATES = ("alpaca", "alpaca_short", "dolly", "chat")
"""Templates that ship with the package."""


@dataclass(frozen=True, kw_only=True)
class InstructionRow:
    """One task and its answer."""

    instruction: str
    """What to do."""
    response: str
    """The answer; Alpaca calls it ``output``."""
    input: str = ""
    """Further context, may be empty; Dolly calls it ``context``."""
    category: str = ""
    """Kind of task, may be empty."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """The wording around instruction, input and response."""

    description: str
    """What the template is for."""
    prompt_input: str
    """Prompt for a row with an input."""
    prompt_no_input: str
    """Prompt for a row without an input."""
    response_split: str
    """Text right before the response, not empty."""
    response_end: str = ""
    """Text right after the response, may be empty."""


class Prompter:
    """Writes prompts after a template and cuts responses out of generated text.

    Args:
        template: one of :data:`TEMPLATES`, or the path of a JSON file.

    Raises:
        DataError: no such template, or a template with missing or wrong parts.
    """

    def __init__(self, template: str | Path = "alpaca") -> None:
        self.template = load_template(template)

    def prompt(
        self, instruction: str, input: str | None = None, response: str | None = None
    ) -> str:
        """Return the prompt, followed by the response if one is given.

        Args:
            instruction: what to do.
            input: further context; None or empty chooses the template without one.
            response: the answer; the template's end marker is added after it.
        """
        if input:
            text = self.template.prompt_input.format(
                instruction=instruction, input=input
            )
        else:
            text = self.template.prompt_no_input.format(instruction=instruction)
        if response is not None:
            text += response + self.template.response_end
        return text

    def document(self, row: InstructionRow) -> str:
        """Return prompt and response of a row as one training document."""
        return self.prompt(row.instruction, row.input, row.response)

    def response_of(self, text: str) -> str:
        """Cut the response out of a prompt with its generated answer.

        Args:
            text: the whole text; what follows the first ``response_split`` counts.

        Returns:
            The response up to its end marker, without blanks around it.

        Raises:
            DataError: the text does not hold ``response_split``.
        """
        _, found, response = text.partition(self.template.response_split)
        if not found:
            raise DataError(
                f"The text does not hold {self.template.response_split!r}, after which "
                f"the response begins: it starts with {text[:60]!r}. Use the template "
                "that wrote the prompt."
            )
        if self.template.response_end:
            response = response.partition(self.template.response_end)[0]
        return response.strip()

    def encode(
        self, tokenizer: Any, row: InstructionRow, max_length: int
    ) -> tuple[list[int], list[int]]:
        """Return the tokens of a row and its labels, the prompt masked.

        Prompt and response are tokenized apart, so the border is exact for every
        tokenizer; one end-of-sequence token closes the response.

        Args:
            tokenizer: a Hugging Face tokenizer with an end-of-sequence token.
            row: task and answer.
            max_length: the response is cut so that at most this many tokens are left.

        Returns:
            ``(input_ids, labels)`` of equal length; labels of the prompt are -100.

        Raises:
            DataError: the prompt alone fills ``max_length``, or the tokenizer has no
                end-of-sequence token.
        """
        if tokenizer.eos_token_id is None:
            raise DataError(
                "The tokenizer has no end-of-sequence token, which closes a response: "
                "set `tokenizer.eos_token`."
            )
        prompt = _ids(tokenizer, self.prompt(row.instruction, row.input))
        if len(prompt) >= max_length:
            raise DataError(
                f"The prompt has {len(prompt)} tokens and leaves none of {max_length} "
                f"to the response: raise max_length or leave out the row that starts "
                f"with {row.instruction[:60]!r}."
            )
        response = _ids(tokenizer, row.response + self.template.response_end)
        if response[-1:] != [tokenizer.eos_token_id]:  # ChatML ends with it already
            response.append(tokenizer.eos_token_id)
        response = response[: max_length - len(prompt)]
        return prompt + response, [IGNORED_LABEL] * len(prompt) + response


def load_template(template: str | Path) -> Template:
    """Read a template by its name or path.

    Raises:
        DataError: no such template, or one with missing, unknown or wrong parts.
    """
    if template in TEMPLATES:
        file = resources.files("samv2.common") / "templates" / f"{template}.json"
        text = file.read_text(encoding="utf-8")
    else:
        path = Path(template)
        if not path.is_file():
            raise DataError(
                f"There is no template {str(template)!r}: use one of "
                f"{', '.join(TEMPLATES)} or the path of a JSON file."
            )
        text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"The template {template} is not JSON: {error}.") from error
    _check_template(template, content)
    return Template(**content)


def _check_template(name: str | Path, content: Any) -> None:
    """Raise one DataError that lists all faults of a template."""
    known = [field.name for field in fields(Template)]
    faults = []
    if not isinstance(content, dict):
        raise DataError(f"The template {name} is not an object with the keys {known}.")
    faults += [f"{key} is unknown" for key in content if key not in known]
    faults += [
        f"{key} is not a string"
        for key in known
        if not isinstance(content.get(key, "" if key == "response_end" else None), str)
    ]
    if not faults:
        needed = {
            "prompt_input": {"instruction", "input"},
            "prompt_no_input": {"instruction"},
        }
        for key, names in needed.items():
            found = _placeholders(content[key])
            if found != names:
                faults.append(f"{key} holds the placeholders {sorted(found or ())}")
        if not content["response_split"]:
            faults.append("response_split is empty")
    if faults:
        raise DataError(
            f"The template {name} needs changes: {'; '.join(faults)}. It has the keys "
            f"{', '.join(known)}; prompt_input holds {{instruction}} and {{input}}, "
            "prompt_no_input only {instruction}."
        )


def _placeholders(text: str) -> set[str] | None:
    """Names in braces; None if the braces do not match."""
    try:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name}
    except ValueError:
        return None


def _ids(tokenizer: Any, text: str) -> list[int]:
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    return [int(i) for i in encoded["input_ids"]]
