"""The benchmarks' tiny model: trained in full it is slow, a few steps show its shape."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from bench.tiny_llama import train_tiny_llama
from tests.helpers import stdlib_text


def test_the_tiny_llama_loads_and_repeats(tmp_path: Path) -> None:
    text = stdlib_text()[:200_000]
    texts = {"one": (text[:100_000],), "two": (text[100_000:],)}
    said: list[str] = []
    for name in ("a", "b"):
        train_tiny_llama(texts, tmp_path / name, steps=2, say=said.append)
    models = [
        LlamaForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("a", "b")
    ]
    assert sum(parameter.numel() for parameter in models[0].parameters()) == 1_049_728
    for left, right in zip(models[0].parameters(), models[1].parameters()):
        assert torch.equal(left, right)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert len(tokenizer) == 2048 and tokenizer.eos_token_id == 1
    assert said[0].startswith("tiny llama: step 1 of 2, loss 7.")
