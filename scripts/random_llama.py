"""Write a Llama-shaped checkpoint of random weights, for measuring time and memory.

The folder has config.json, sharded safetensors with their index, and a tokenizer, so
everything that takes a model folder takes it. The model has learned nothing, but its
activations are finite: weights are normal with standard deviation 0.02, those that write
to the residual stream are scaled by 1 / sqrt(2 L), norms are one. One shard at a time is
in memory. The same shape, layers, dtype and seed give the same bits.

  python scripts/random_llama.py --output runs/random-7b --shape llama-2-7b
  python scripts/random_llama.py --output runs/one-layer --shape llama-2-7b --layers 1
  samv2 bootstrap runs/random-7b --output runs/random-7b-experts

Shapes: L layers.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from samv2.common.errors import ModelError, SamError
from samv2.common.files import replace_folder
from samv2.models.model_files import read_tokenizer

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": dict(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    ),
    "smollm2-135m": dict(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    ),
    "tiny": dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    ),
}
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
STD = 0.02
SHARD_BYTES = 2**30
END = "<|endoftext|>"
TRAINED_VOCAB = 512


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, write the folder and say what was written."""
    options = parser().parse_args(arguments)
    try:
        print(write(options))
    except SamError as error:
        sys.exit(f"error: {error}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    lines = argparse.RawDescriptionHelpFormatter
    text = (__doc__ or "").partition("\nShapes:")[0]
    made = argparse.ArgumentParser(description=text, formatter_class=lines)
    made.add_argument(
        "--output", type=Path, required=True, help="folder to write; new or empty"
    )
    made.add_argument(
        "--shape", choices=SHAPES, required=True, help="whose widths and depth to take"
    )
    made.add_argument(
        "--layers", type=int, help="decoder layers; default the shape's own number"
    )
    made.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="stored as; default bfloat16",
    )
    made.add_argument("--seed", type=int, default=0, help="of the weights; default 0")
    made.add_argument(
        "--tokenizer",
        type=Path,
        help="folder of a model whose tokenizer is copied; its vocabulary must fit into "
        f"the shape's. Default: a byte-level BPE of up to {TRAINED_VOCAB} tokens",
    )
    return made


def write(options: argparse.Namespace) -> str:
    """Write the checkpoint; one sentence about it.

    Raises:
        ModelError: the folder is not empty, the tokenizer is too big or unreadable, there
            are no layers, or the disk is too full.
    """
    folder: Path = options.output
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(
            f"{folder} exists and is not an empty folder; name another --output or "
            "remove it"
        )
    shape = dict(SHAPES[options.shape])
    if options.layers is not None:
        shape["num_hidden_layers"] = options.layers
    if shape["num_hidden_layers"] < 1:
        raise ModelError(f"--layers is {options.layers}; a model needs at least 1")
    tokenizer = choose_tokenizer(options.tokenizer, shape["vocab_size"])
    dtype = DTYPES[options.dtype]
    config = LlamaConfig(
        **shape,
        initializer_range=STD,
        architectures=["LlamaForCausalLM"],
        dtype=options.dtype,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    shapes = tensor_shapes(config)
    numbers = sum(map(math.prod, shapes.values()))
    check_space(folder, numbers * dtype.itemsize)
    with replace_folder(folder) as target:
        config.save_pretrained(target)
        tokenizer.save_pretrained(target)
        files = write_shards(target, config, shapes, dtype, options.seed)
    return (
        f"{folder}: {options.shape}, {config.num_hidden_layers} layers, "
        f"{numbers / 1e6:,.1f} million parameters, {numbers * dtype.itemsize / 1e9:,.3f} "
        f"GB of {options.dtype} in {files} files"
    )


def choose_tokenizer(source: Path | None, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, or one trained on this file's text.

    Raises:
        ModelError: it is unreadable, or has ids beyond the model's vocabulary.
    """
    if source is None:
        return train_tokenizer(min(vocab_size, TRAINED_VOCAB))
    tokenizer = read_tokenizer(source)
    if len(tokenizer) > vocab_size:
        raise ModelError(
            f"the tokenizer in {source} has {len(tokenizer)} tokens, the model's "
            f"vocabulary has {vocab_size}; use a smaller tokenizer or another --shape"
        )
    return tokenizer


def train_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE that encodes any text, of at most ``vocab_size`` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = Path(__file__).read_text(encoding="utf-8")
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END
    )


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """What the checkpoint stores, in the model's order; no head where it is tied."""
    with torch.device("meta"):
        tensors = LlamaForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_space(folder: Path, num_bytes: int) -> None:
    """Refuse to begin what the disk cannot hold."""
    there = next(path for path in folder.absolute().parents if path.is_dir())
    free = shutil.disk_usage(there).free
    if num_bytes > free:
        raise ModelError(
            f"the weights take {num_bytes / 1e9:.1f} GB and {there} has "
            f"{free / 1e9:.1f} GB free; use fewer --layers or another --output"
        )


def write_shards(
    folder: Path,
    config: LlamaConfig,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    seed: int,
) -> int:
    """Write the weights and their index; how many files of weights there are."""
    shards = list(divide(shapes, dtype))
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            name: random_tensor(name, shapes[name], config, generator).to(dtype)
            for name in names
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        del tensors  # or two shards would be in memory while the next one is made
        weight_map |= dict.fromkeys(names, file)
        print(f"wrote {number} of {len(shards)} files", file=sys.stderr)
    total = sum(map(math.prod, shapes.values()))
    index = {
        "metadata": {"total_parameters": total, "total_size": total * dtype.itemsize},
        "weight_map": weight_map,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return len(shards)


def divide(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> Iterator[list[str]]:
    """Names per file: two files or more, each of about 1 GiB at most.

    Tensors stay in the model's order, so a decoder layer may lie in two files.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    total = sum(sizes.values())
    limit = total / max(2, math.ceil(total / SHARD_BYTES))
    names: list[str] = []
    for name, size in sizes.items():
        if names and sum(sizes[other] for other in names) + size > limit:
            yield names
            names = []
        names.append(name)
    yield names


def random_tensor(
    name: str,
    shape: tuple[int, ...],
    config: LlamaConfig,
    generator: torch.Generator,
) -> Tensor:
    """One tensor in float32: ones for a norm, normal numbers for a matrix."""
    if len(shape) == 1:
        return torch.ones(shape)
    std = STD
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        std /= math.sqrt(2 * config.num_hidden_layers)
    return torch.empty(shape).normal_(0, std, generator=generator)


if __name__ == "__main__":
    main()
