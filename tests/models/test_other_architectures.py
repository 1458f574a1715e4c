"""Mistral- and Qwen2-style models become expert graphs, save, load and export."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from samv2.experts.moe_layers import WalkOptions
from samv2.models.expert_model import ExpertModel
from samv2.models.export import export_dense
from samv2.models.save import save_expert_model
from tests.helpers import VOCAB, assert_close, convert, generator

SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)


def mistral() -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MistralForCausalLM(MistralConfig(sliding_window=16, **SIZES)).eval()


def qwen2() -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()


@pytest.mark.parametrize("make", [mistral, qwen2])
def test_conversion_is_lossless_with_all_experts_and_exports(make) -> None:
    dense = make()
    tokens_BS = torch.randint(VOCAB, (2, 40), generator=generator(1))
    expected = dense(tokens_BS).logits.detach()
    calibration = torch.randint(VOCAB, (8, 32), generator=generator(2))
    model = convert(dense, calibration).model
    actual = model(tokens_BS, walk_options=WalkOptions(experts_per_token=8)).logits
    assert_close("logits at K = E", actual, expected, "logits")
    assert_close("export", export_dense(model)(tokens_BS).logits, actual, "logits")


def test_transformers_refuses_an_expert_graph(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    calibration = torch.randint(VOCAB, (8, 32), generator=generator(2))
    made = convert(mistral(), calibration).model
    save_expert_model(made, tiny_tokenizer, tmp_path / "graph")
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "graph", local_files_only=True)
    tokens_BS = torch.randint(VOCAB, (1, 20), generator=generator(3))
    loaded = ExpertModel.from_pretrained(tmp_path / "graph")
    assert_close("loaded", loaded(tokens_BS).logits, made(tokens_BS).logits, "logits")
