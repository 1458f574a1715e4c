"""``samv2 generate``: let a run, an expert graph or a dense model write."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samv2.cli import existing_file

if TYPE_CHECKING:
    from rich.console import Console

    from samv2.federated.generation import Continuation, Decoding, Writers

DESCRIPTION = """\
Continues each prompt. One model writes as it thinks; --side-by-side shows what the dense
model behind an expert graph writes beside it. Without a prompt, prompts are asked for
until an empty line; with --chat that is one conversation.
"""
EXAMPLES = """\
examples:
  samv2 generate logs "The capital of France is"
  samv2 generate logs --side-by-side --file prompts.txt --max-new-tokens 60
  samv2 generate my-experts --experts 8 --chat
"""


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "generate",
        help="let a run or model write text",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL_OR_RUN", help="run directory, folder, hub id, smollm2"
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to continue")
    parser.add_argument(
        "--file",
        type=existing_file,
        metavar="FILE",
        help="more prompts, one a line; empty lines are left out",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=128,
        metavar="N",
        help="tokens to add at most (default: 128)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 takes the likeliest token (default); 1 draws as the model weighs them",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)"
    )
    parser.add_argument(
        "--experts", type=int, metavar="K", help="experts a token visits"
    )
    parser.add_argument(
        "--side-by-side",
        action="store_true",
        help="show the dense model behind the expert graph too",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="put prompts into the tokenizer's chat template",
    )
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    from samv2.common.errors import ConfigError
    from samv2.common.telemetry import make_console
    from samv2.federated.generation import Decoding, chat_ids, load_writers

    decoding = Decoding(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
    prompts = list(arguments.prompts)
    if arguments.file is not None:
        prompts += _lines(arguments.file)
    if not prompts and (arguments.json or not sys.stdin.isatty()):
        raise ConfigError(
            [
                "there is no prompt, and no terminal to ask for one; write it behind the "
                "model, or give --file"
            ]
        )
    writers = load_writers(
        arguments.model,
        experts_per_token=arguments.experts,
        side_by_side=arguments.side_by_side,
        console=make_console(stderr=True),
    )
    if arguments.chat:
        chat_ids(writers.tokenizer, [{"role": "user", "content": ""}])
    console = make_console()
    if arguments.json:
        print(
            json.dumps(_to_json(writers, prompts, decoding, arguments.chat), indent=1)
        )
        return 0
    pen = _Pen(writers, decoding, console, chat=arguments.chat)
    for prompt in prompts:
        pen.write(prompt, echo=True)
        pen.forget()
    if not prompts:
        for prompt in _asked(console):
            pen.write(prompt, echo=False)
    return 0


class _Pen:
    """Writes answers to the terminal, and remembers a conversation.

    Args:
        writers: the models.
        decoding: how they write.
        console: where to.
        chat: whether prompts are turns of a conversation.
    """

    def __init__(
        self, writers: Writers, decoding: Decoding, console: Console, *, chat: bool
    ) -> None:
        self._writers, self._decoding = writers, decoding
        self._console, self._chat = console, chat
        self.forget()

    def forget(self) -> None:
        """Begin a new conversation."""
        self._said: dict[str, list[dict[str, str]]] = {
            label: [] for label in self._writers.models
        }

    def write(self, prompt: str, *, echo: bool) -> None:
        """Answer one prompt.

        Args:
            prompt: text, or the user's turn.
            echo: show it first.
        """
        if echo:
            end = "\n" if self._chat or len(self._writers.models) > 1 else ""
            self._console.print(
                prompt, style="bold", markup=False, soft_wrap=True, end=end
            )
        alone = len(self._writers.models) == 1
        answers = {
            label: self._answer(label, prompt, _show if alone else None)
            for label in self._writers.models
        }
        if alone:
            print()
        else:
            self._table(answers)

    def _answer(
        self, label: str, prompt: str, on_text: Callable[[str], None] | None
    ) -> Continuation:
        said = self._said[label]
        answer = _continue(
            self._writers, label, prompt, self._decoding, on_text, said, self._chat
        )
        if self._chat:
            said.append({"role": "user", "content": prompt})
            said.append({"role": "assistant", "content": answer.text})
        return answer

    def _table(self, answers: dict[str, Continuation]) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(show_lines=False, expand=True)
        for label, answer in answers.items():
            rate = answer.tokens / max(answer.seconds, 1e-9)
            table.add_column(f"{label} ({rate:.1f} tokens/s)", ratio=1)
        table.add_row(*(Text(_printable(answer.text)) for answer in answers.values()))
        self._console.print(table)


def _continue(
    writers: Writers,
    label: str,
    prompt: str,
    decoding: Decoding,
    on_text: Callable[[str], None] | None,
    said: list[dict[str, str]],
    chat: bool,
) -> Continuation:
    from samv2.federated.generation import chat_ids, continue_text, prompt_ids

    tokenizer = writers.tokenizer
    if chat:
        ids = chat_ids(tokenizer, [*said, {"role": "user", "content": prompt}])
    else:
        ids = prompt_ids(tokenizer, prompt)
    return continue_text(writers.models[label], tokenizer, ids, decoding, on_text)


def _to_json(
    writers: Writers, prompts: list[str], decoding: Decoding, chat: bool
) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "name": writers.name,
        "decoding": asdict(decoding),
        "answers": [
            {
                "prompt": prompt,
                "models": {
                    label: asdict(
                        _continue(writers, label, prompt, decoding, None, [], chat)
                    )
                    for label in writers.models
                },
            }
            for prompt in prompts
        ],
    }


def _lines(path: Path) -> list[str]:
    """A prompt a line.

    Raises:
        DataError: the file is no text, or has no line.
    """
    from samv2.common.errors import DataError

    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"--file {path} is not UTF-8 text: {error}") from None
    found = [line for line in text.splitlines() if line.strip()]
    if not found:
        raise DataError(f"--file {path} has no prompt; write one a line")
    return found


def _asked(console: Console) -> Iterator[str]:
    """Prompts from the terminal, until an empty line or the end of input."""
    console.print("An empty line ends.", style="dim")
    while True:
        try:
            prompt = console.input("[bold]> [/bold]")
        except EOFError:
            print()
            return
        if not prompt.strip():
            return
        yield prompt


def _show(text: str) -> None:
    print(_printable(text), end="", flush=True)


def _printable(text: str) -> str:
    """Without characters that steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
