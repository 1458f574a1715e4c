"""What all tests share: tolerances, comparison, a tiny model and random inputs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from samv2.common.config import load_settings
from samv2.common.settings import Settings
from samv2.models.bootstrap import Bootstrapped, bootstrap
from samv2.models.expert_model import ExpertModel

TOLERANCES = {
    # The same sum in another order, in float64: a few units in the last place.
    "fp64": 1e-11,
    # The same in float32; thousands of terms reach some 1e-6.
    "fp32": 1e-5,
    # bfloat16 keeps 8 bits (4e-3); outputs see three roundings in a row, gradients six.
    "bf16": 3e-2,
    # Logits behind a few float32 layers whose FFN rows were summed in another order.
    "logits": 1e-4,
    # Central differences in float64: truncation ~ step^2, cancellation ~ 1e-16 / step.
    "finite_difference": 1e-6,
}
"""Largest error, as a share of the largest expected value."""

END = "<|endoftext|>"
VOCAB = 512
TEXT_MODULES = ("argparse", "inspect", "typing", "tarfile", "subprocess", "shutil")
TRAIN_STEPS, LEARNING_RATE = 160, 5e-3


def assert_close(name: str, actual: Tensor, expected: Tensor, ratio: str) -> None:
    """Compare two tensors by their largest error.

    Args:
        name: of what is compared, for the message.
        actual: what the code returned.
        expected: what it should be, in the same shape; any dtype.
        ratio: a key of :data:`TOLERANCES`.
    """
    assert actual.shape == expected.shape, f"{name}: {actual.shape} != {expected.shape}"
    if not expected.numel():
        return
    assert bool(actual.isfinite().all()), f"{name}: not finite"
    error = float((actual.detach().double() - expected.detach().double()).abs().max())
    allowed = TOLERANCES[ratio] * float(expected.detach().double().abs().max())
    assert error <= allowed, f"{name}: error {error:.3g}, {ratio} allows {allowed:.3g}"


def generator(seed: int) -> torch.Generator:
    """A seeded generator."""
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, the same for every dtype up to rounding."""
    return torch.randn(shape, generator=generator(seed), dtype=torch.double).to(dtype)


def stdlib_text() -> str:
    """Some 800 kB of Python source that every machine has."""
    folder = Path(os.__file__).parent
    return "".join(
        (folder / f"{name}.py").read_text(encoding="utf-8") for name in TEXT_MODULES
    )


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of :data:`VOCAB` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [text[:100_000]],
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END
    )


def tiny_config(**changes: Any) -> LlamaConfig:
    """A Llama of 3 layers and some 150,000 parameters."""
    values: dict[str, Any] = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaConfig(**(values | changes))


def random_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """An untrained tiny Llama."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(tiny_config(**changes)).eval()


def train_llama(token_ids: Tensor) -> LlamaForCausalLM:
    """A tiny Llama after a few seconds of training on (N,) tokens."""
    llama = random_llama()
    llama.train()
    source = generator(0)
    optimizer = torch.optim.AdamW(llama.parameters(), lr=LEARNING_RATE)
    for step in range(TRAIN_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / TRAIN_STEPS)
        starts = torch.randint(len(token_ids) - 64, (8,), generator=source)
        batch = torch.stack([token_ids[start : start + 64] for start in starts])
        llama(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return llama.eval()


def tiny_settings(*overrides: str) -> Settings:
    """Settings that fit the tiny model: E = 8, K = 4 in all layers, short prefix."""
    return load_settings(
        None,
        [
            "experts.num_experts=8",
            "experts.experts_per_token=4",
            "experts.num_shared=1",
            "experts.layers=all",
            "experts.surrogate_rank=4",
            "experts.repair_rank=4",
            "experts.allocate=false",
            "adapter.rank=4",
            "assembler.prefix_tokens=8",
            *overrides,
        ],
    )


def convert(
    llama: LlamaForCausalLM, calibration_BS: Tensor, overrides: Sequence[str] = ()
) -> Bootstrapped:
    """Bootstrap with :func:`tiny_settings`."""
    return bootstrap(llama, calibration_BS, tiny_settings(*overrides))


def stir(model: ExpertModel) -> ExpertModel:
    """Non-zero adapters and assembler; u and the edges' strengths stay 0."""
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.requires_grad and "mix_E" not in name and "strength" not in name:
            parameter.data += 0.1 * randn(*parameter.shape, seed=seed)
    return model


@torch.no_grad()
def logits_of(model: torch.nn.Module, ids: Tensor, **kwargs: object) -> Tensor:
    """Of (B, S) token ids, without gradients."""
    return model(ids, **kwargs).logits
