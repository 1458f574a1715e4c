"""A text's stream through dense layers is the one of the model itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from samv2.models import text_stream
from samv2.models.dense_layers import DenseLayers
from samv2.models.text_stream import LlamaLayers, TextStream
from tests.helpers import VOCAB, assert_close, generator, random_llama

WINDOW, LENGTH = 8, 20
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.1,
)
MODELS: dict[str, Callable[[str], PreTrainedModel]] = {
    "llama": lambda attention: random_llama(attn_implementation=attention),
    "windowed mistral": lambda attention: MistralForCausalLM(
        MistralConfig(sliding_window=WINDOW, attn_implementation=attention, **SIZES)
    ),
    "half windowed qwen2": lambda attention: Qwen2ForCausalLM(
        Qwen2Config(
            sliding_window=WINDOW,
            use_sliding_window=True,
            max_window_layers=1,
            attn_implementation=attention,
            **SIZES,
        )
    ),
}


def make(kind: str, attention: str = "sdpa") -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[kind](attention).eval()


def some_tokens(sequences: int) -> Tensor:
    return torch.randint(VOCAB, (sequences, LENGTH), generator=generator(1))


def stream_of(source: LlamaLayers | DenseLayers, tokens_BS: Tensor) -> TextStream:
    return TextStream(
        source.embed(tokens_BS), source.attention_inputs(tokens_BS.shape[1])
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_the_stream_is_that_of_the_model(kind: str, attention: str) -> None:
    """Behind every layer, and what every FFN sees; windows are shorter than the text."""
    model, tokens_BS = make(kind, attention), some_tokens(3)
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    output = model.model(tokens_BS, output_hidden_states=True, use_cache=False)
    source = LlamaLayers(model)
    stream = stream_of(source, tokens_BS)
    assert torch.equal(stream.hidden_BSD, output.hidden_states[0])
    for index in range(model.config.num_hidden_layers):
        layer = source.layer(index)
        x_BSD, after_BSD = stream.attend(layer, index)
        assert_close(f"FFN input {index}", x_BSD, seen[index], "fp32")
        stream.advance(x_BSD, after_BSD, layer.mlp)
        if index < 2:
            expected = output.hidden_states[index + 1]
            assert_close(f"stream {index}", stream.hidden_BSD, expected, "fp32")
    found = model.model.norm(stream.hidden_BSD)
    assert_close("last", found, output.last_hidden_state, "fp32")


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_a_model_on_disk_has_the_same_stream(kind: str, tmp_path: Path) -> None:
    model, tokens_BS = make(kind), some_tokens(2)
    model.save_pretrained(tmp_path)
    streams = []
    for source in (
        LlamaLayers(model),
        DenseLayers.open(tmp_path, dtype=torch.float32),
    ):
        stream = stream_of(source, tokens_BS)
        for index in range(source.config.num_hidden_layers):
            layer = source.layer(index)
            stream.advance(*stream.attend(layer, index), layer.mlp)
        streams.append(stream.hidden_BSD)
    assert_close("stream", streams[1], streams[0], "fp32")


@pytest.mark.parametrize("at_once", [1, 2, 100])
@torch.no_grad()
def test_how_many_sequences_run_at_once_does_not_matter(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, tokens_BS = LlamaLayers(random_llama()), some_tokens(5)
    results = []
    for size in (5, at_once):
        monkeypatch.setattr(text_stream, "SEQUENCES_AT_ONCE", size)
        stream, sizes = stream_of(source, tokens_BS), []

        def ffn(x_BSD: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(len(x_BSD))
            return source.layer(0).mlp(x_BSD)

        stream.advance(*stream.attend(source.layer(0), 0), ffn)
        assert sum(sizes) == 5 and max(sizes) <= size
        results.append(stream.hidden_BSD)
    assert_close("stream", results[1], results[0], "fp32")


@torch.no_grad()
def test_two_streams_may_begin_as_one() -> None:
    """What one of them adds does not reach the other."""
    source, tokens_BS = LlamaLayers(random_llama()), some_tokens(2)
    hidden_BSD = source.embed(tokens_BS)
    inputs = source.attention_inputs(LENGTH)
    first, second = (TextStream(hidden_BSD, inputs) for _ in range(2))
    x_BSD, after_BSD = first.attend(source.layer(0), 0)
    first.advance(x_BSD, after_BSD, lambda x: torch.full_like(x, 3.0))
    assert_close("first", first.hidden_BSD, after_BSD + 3.0, "fp32")
    assert torch.equal(second.hidden_BSD, source.embed(tokens_BS))


def test_bfloat16_streams_keep_their_dtype() -> None:
    llama: LlamaForCausalLM = random_llama().bfloat16()
    source = LlamaLayers(llama)
    with torch.no_grad():
        stream = stream_of(source, some_tokens(2))
        x_BSD, after_BSD = stream.attend(source.layer(0), 0)
    assert x_BSD.dtype == after_BSD.dtype == torch.bfloat16
