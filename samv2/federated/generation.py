"""Text from a run, an expert graph or a dense model: one token after another.

Decoding is a loop of its own rather than Hugging Face's ``generate``: it draws from a
generator that it is given, hands out text as it comes, and treats both kinds of model
alike.

Shapes: S positions, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from samv2.common.errors import ConfigError, DataError, ModelError
from samv2.common.settings import ModelSettings, Settings
from samv2.federated.evaluation import dense_model, with_model
from samv2.federated.run_folder import is_run, load_model_or_run, stored_settings
from samv2.models.expert_model import ExpertCache, ExpertModel
from samv2.models.llama_loader import DTYPES, load_llama
from samv2.models.save import is_expert_model

EXPERT, DENSE = "expert graph", "dense model"
Messages = Sequence[dict[str, str]]
"""A conversation: ``{"role": ..., "content": ...}`` each."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How text is continued."""

    max_new_tokens: int = 128
    """Most tokens to add."""
    temperature: float = 0.0
    """Of the softmax that tokens are drawn from; 0 takes the likeliest."""
    seed: int = 0
    """Of the draws; each prompt begins with it anew."""

    def __post_init__(self) -> None:
        faults = []
        if self.max_new_tokens < 1:
            faults.append(f"--max-new-tokens is {self.max_new_tokens}; use at least 1")
        if not 0 <= self.temperature < float("inf"):
            faults.append(f"--temperature is {self.temperature}; use 0 or more")
        if not 0 <= self.seed < 2**63:
            faults.append(f"--seed is {self.seed}; use a whole number from 0")
        if faults:
            raise ConfigError(faults)


@dataclass(frozen=True, kw_only=True)
class Writers:
    """Models that continue the same prompts."""

    name: str
    """What was loaded, for a person."""
    models: dict[str, Any]
    """By label."""
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What a model added to a prompt."""

    text: str
    tokens: int
    seconds: float


def load_writers(
    target: str,
    *,
    experts_per_token: int | None = None,
    side_by_side: bool = False,
    console: Console,
) -> Writers:
    """Load what is to write.

    Args:
        target: run directory, bootstrapped folder, or a dense model.
        experts_per_token: K; None keeps the run's or the folder's.
        side_by_side: load the dense model behind an expert graph too.
        console: where progress is shown.

    Raises:
        SamError: the target cannot be loaded, or is dense and has no experts to choose
            or compare.
    """
    folder = Path(target)
    if not is_run(folder) and not is_expert_model(folder):
        for option, given in (
            ("--experts", experts_per_token is not None),
            ("--side-by-side", side_by_side),
        ):
            if given:
                raise ModelError(
                    f"{option} was given, but {target} has no experts; leave it out, or "
                    "name a run or a bootstrapped folder"
                )
        loaded = load_llama(
            target, dtype=DTYPES[ModelSettings().dtype], progress=console.print
        )
        models = {DENSE: loaded.model}
        return Writers(name=loaded.name, models=models, tokenizer=loaded.tokenizer)
    settings = with_model(Settings(), folder)
    model, tokenizer, name = load_model_or_run(folder)
    if is_run(folder):
        settings = stored_settings(folder)
        model.set_experts_per_token(settings.experts.experts_per_token)
    if experts_per_token is not None:
        model.set_experts_per_token(experts_per_token)
    models = {}
    if side_by_side:
        label, dense = dense_model(settings, console)
        models[label] = dense
    return Writers(name=name, models=models | {EXPERT: model}, tokenizer=tokenizer)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """(1, S) token ids of a text to continue.

    Raises:
        DataError: the text has no token.
    """
    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise DataError("the prompt is empty; give at least one word")
    return torch.tensor([ids])


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Tensor:
    """(1, S) token ids of a conversation in which it is the model's turn.

    Raises:
        ModelError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            "the model's tokenizer has no chat template; leave out --chat, which then "
            "continues the prompt as text"
        )
    text = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor([ids])


def continue_text(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids_1S: Tensor,
    decoding: Decoding,
    on_text: Callable[[str], None] | None = None,
) -> Continuation:
    """Add tokens to a prompt until the model ends the text.

    Args:
        model: dense or expert graph, in evaluation mode.
        tokenizer: its.
        ids_1S: (1, S) int64, the prompt.
        decoding: how.
        on_text: called with each piece of text as it comes.

    Raises:
        DataError: the prompt fills the model's context.
    """
    begin = time.perf_counter()
    new: list[int] = []
    shown = ""
    for token in decode(model, ids_1S, decoding, ends=end_tokens(model, tokenizer)):
        new.append(token)
        text = tokenizer.decode(new, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # else the rest of a character is to come
            if on_text is not None:
                on_text(text[len(shown) :])
            shown = text
    text = tokenizer.decode(new, skip_special_tokens=True)
    if on_text is not None and text != shown:
        on_text(text[len(shown) :])
    return Continuation(text=text, tokens=len(new), seconds=time.perf_counter() - begin)


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a text, by the tokenizer and by the model's config."""
    of_model = model.config.eos_token_id
    listed = of_model if isinstance(of_model, (list, tuple)) else [of_model]
    found = {tokenizer.eos_token_id, *listed}
    return frozenset(token for token in found if token is not None)


def decode(
    model: Any, ids_1S: Tensor, decoding: Decoding, *, ends: frozenset[int]
) -> Iterator[int]:
    """The tokens that follow a prompt, without the one that ends the text.

    Raises:
        DataError: the prompt fills the model's context.
    """
    most = getattr(model.config, "max_position_embeddings", None)
    room = decoding.max_new_tokens
    if most is not None:
        room = min(room, most - ids_1S.shape[1])
        if room < 1:
            raise DataError(
                f"the prompt has {ids_1S.shape[1]} tokens, the model's context is {most}; "
                "shorten it"
            )
    expert = isinstance(model, ExpertModel)
    cache = (ExpertCache if expert else DynamicCache)(config=model.config)
    generator = torch.Generator().manual_seed(decoding.seed)
    ids = ids_1S
    for _ in range(room):
        with torch.no_grad():
            logits_V = model(ids, use_cache=True, cache=cache).logits[0, -1].float()
        token = _choose(logits_V, decoding.temperature, generator)
        if token in ends:
            return
        yield token
        ids = torch.tensor([[token]])


def _choose(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    if not temperature:
        return int(logits_V.argmax())
    shares_V = torch.softmax(logits_V / temperature, dim=0)
    return int(torch.multinomial(shares_V, 1, generator=generator))
