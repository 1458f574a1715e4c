"""A Llama of 1 M parameters, trained from scratch in some 190 CPU seconds.

Run with ``python bench/tiny_llama.py FOLDER``, or import :func:`cached_tiny_llama`. Nine
built-in domains, a byte-level BPE of 2,048 tokens, 700 steps of 16 windows of 128 tokens:
small enough for a test bed, good enough to have something to lose. Protocol B2 fine-tunes
it on domains that it never saw.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from samv2.common.fetch import cache_dir
from samv2.common.files import replace_folder
from samv2.common.threads import one_thread
from samv2.data.corpus import PartSizes, build_corpus
from samv2.data.tokens import sample_batch, tokenize_documents

DOMAINS = (
    "bible",
    "biomed",
    "chat",
    "factbook",
    "legal",
    "politics",
    "python",
    "quotes",
    "wiki",
)
VERSION = 1
"""Raised whenever the same text would give another model."""
VOCABULARY, TOKENIZER_CHARACTERS = 2048, 300_000
STEPS, WINDOWS, LENGTH = 700, 16, 128
LEARNING_RATE, WARM_UP, FLOOR = 3e-3, 50, 0.1
Say = Callable[[str], None]


def cached_tiny_llama(say: Say = print) -> Path:
    """The model's folder, trained where the cache does not have it.

    Raises:
        FetchError: a domain's package cannot be downloaded.
    """
    folder = cache_dir() / "models" / f"tiny-llama-v{VERSION}"
    if not folder.is_dir():
        make_tiny_llama(folder, say)
    return folder


def make_tiny_llama(folder: Path, say: Say = print) -> None:
    """Train on the built-in domains and write ``folder`` whole or not at all."""
    corpus = build_corpus(
        DOMAINS,
        cache=cache_dir(),
        seed=0,
        sizes=PartSizes(calibration_bytes=0),
        progress=say,
    )
    train_tiny_llama(
        {name: text.train for name, text in corpus.domains.items()}, folder, say=say
    )


def train_tiny_llama(
    texts: Mapping[str, Sequence[str]],
    folder: Path,
    *,
    steps: int = STEPS,
    seed: int = 0,
    say: Say = print,
) -> None:
    """Train tokenizer and model, and save them in bfloat16.

    Args:
        texts: documents by domain; a step draws windows from them in turn.
        folder: written whole or not at all.
        steps: of AdamW (0.9, 0.95), weight decay 0.1, warm-up and cosine to a tenth.
        seed: of initialisation and windows.
        say: told the loss now and then.
    """
    joined = {name: "\n\n".join(documents) for name, documents in texts.items()}
    tokenizer = _train_tokenizer(
        [text[:TOKENIZER_CHARACTERS] for text in joined.values()]
    )
    streams = [tokenize_documents(tokenizer, [text]) for text in joined.values()]
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_config())
        _train(model, streams, steps, seed, say)
    with replace_folder(folder) as target:
        model.to(torch.bfloat16).save_pretrained(target)
        tokenizer.save_pretrained(target)


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def _train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def _train(
    model: LlamaForCausalLM, streams: Sequence[Tensor], steps: int, seed: int, say: Say
) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1
    )
    sources = [torch.Generator().manual_seed(seed + i) for i in range(len(streams))]
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * _rate(step, steps)
        turns = [(step * WINDOWS + i) % len(streams) for i in range(WINDOWS)]
        windows = [sample_batch(streams[i], 1, LENGTH, sources[i]) for i in turns]
        batch_BS = torch.cat(windows)
        loss = model(input_ids=batch_BS, labels=batch_BS, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            say(
                f"tiny llama: step {step + 1} of {steps}, loss {float(loss.detach()):.3f}"
            )
    model.eval()


def _rate(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / WARM_UP)
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return warm * (FLOOR + (1 - FLOOR) * cosine)


def main() -> int:
    """Write the model to the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    make_tiny_llama(parser.parse_args().folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
