"""The dense model behind a run, whatever the run began with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from samv2.federated.evaluation import dense_model, with_model
from samv2.models.quantised_blocks import quantise_model
from samv2.models.save import load_expert_model, save_expert_model
from tests.federated.runs import quiet, small_settings
from tests.helpers import assert_close, logits_of


def test_dense_folder_and_rejoined_experts_agree(
    tiny_llama_folder: Path, expert_folder: Path, tiny_batch: Tensor
) -> None:
    settings = small_settings(tiny_llama_folder)
    label, dense = dense_model(settings, quiet())
    other, rejoined = dense_model(with_model(settings, expert_folder), quiet())
    assert label == other == "dense model"
    assert type(rejoined) is LlamaForCausalLM
    found, expected = logits_of(rejoined, tiny_batch), logits_of(dense, tiny_batch)
    assert_close("logits", found, expected, "logits")


def test_four_bits_are_said_to_be(expert_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_expert_model(expert_folder)
    quantise_model(model)
    save_expert_model(model, tokenizer, tmp_path / "nf4")
    label, dense = dense_model(small_settings(tmp_path / "nf4"), quiet())
    assert label == "dense model, nf4"
    weight = dense.model.layers[0].mlp.gate_proj.weight
    found = model.expert_layers[0].block("gate_EFD", torch.float32).flatten(0, 1)
    assert torch.equal(weight, found)
