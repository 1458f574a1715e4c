"""Expert models on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from samv2.common.errors import ModelError
from samv2.experts.moe_layers import WalkOptions
from samv2.models.expert_model import ExpertModel
from samv2.models.save import (
    is_expert_model,
    load_expert_model,
    save_expert_model,
)
from tests.helpers import assert_close, convert, logits_of, stir


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["assembler.width=0"],
        ["experts.surrogate_rank=0"],
        ["experts.layers=0,2", "experts.chains=true", "experts.num_shared=0"],
        ["experts.combine=softmax"],
        ["experts.other_k=2,6", "experts.allocate=true", "experts.repair_rank=3"],
        ["experts.repair_rank=0"],
        ["experts.repair=false"],
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_keeps_every_bit(
    tiny_llama_folder: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_calibration: Tensor,
    tiny_batch: Tensor,
    tmp_path: Path,
    overrides: list[str],
    dtype: torch.dtype,
) -> None:
    """Of the tensors; products also depend on how a tensor is aligned in memory."""
    llama = LlamaForCausalLM.from_pretrained(tiny_llama_folder, dtype=dtype).eval()
    model = stir(convert(llama, tiny_calibration, overrides).model)
    model.set_experts_per_token(3)
    save_expert_model(model, tiny_tokenizer, tmp_path / "model")
    loaded, tokenizer = load_expert_model(tmp_path / "model")
    assert loaded.expert_config == model.expert_config
    assert loaded.expert_config.experts_per_token == 3
    expected, found = model.state_dict(), loaded.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(
            found[name], value
        ), name
    again, _ = load_expert_model(tmp_path / "model")
    assert torch.equal(logits_of(loaded, tiny_batch), logits_of(again, tiny_batch))
    ratio = "fp32" if dtype == torch.float32 else "bf16"
    expected_logits = logits_of(model, tiny_batch)
    assert_close("logits", logits_of(loaded, tiny_batch), expected_logits, ratio)
    text = "def walk(self):\n    return None"
    assert tokenizer(text).input_ids == tiny_tokenizer(text).input_ids
    trainable = {n for n, p in loaded.named_parameters() if p.requires_grad}
    assert trainable == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not loaded.training


def test_repairs_and_visits_are_kept(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_calibration: Tensor,
    tiny_batch: Tensor,
    tmp_path: Path,
) -> None:
    overrides = ["experts.other_k=2,6", "experts.allocate=true"]
    model = convert(tiny_llama, tiny_calibration, overrides).model
    save_expert_model(model, tiny_tokenizer, tmp_path / "model")
    loaded, _ = load_expert_model(tmp_path / "model")
    config = loaded.expert_config
    assert config.repaired == (2, 4, 6) and len(config.visits) == 3
    for position, (layer, made) in enumerate(
        zip(loaded.expert_layers, model.expert_layers, strict=True)
    ):
        assert layer.repaired == (2, 4, 6)
        assert layer.visits == made.visits == config.layer_visits(position)
        for k in layer.repaired:
            found, expected = layer.repair(k), made.repair(k)
            assert found is not None and expected is not None
            for name, value in vars(expected).items():
                assert torch.equal(getattr(found, name), value), name
    for k in (1, 2, 3, 4, 6, 8):
        options = WalkOptions(experts_per_token=k)
        expected = logits_of(model, tiny_batch, walk_options=options)
        found = logits_of(loaded, tiny_batch, walk_options=options)
        assert_close(f"K = {k}", found, expected, "fp32")
        assert loaded.flops_fraction(k) == model.flops_fraction(k)


def test_weights_may_be_spread_over_files(
    tiny_expert_model: ExpertModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    folder = saved(tiny_expert_model, tiny_tokenizer, tmp_path / "model")
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(whole)
    for part in range(3):
        tensors = {name: whole[name].clone() for name in names[part::3]}
        save_file(tensors, folder / f"part-{part}.safetensors")
    expected = tiny_expert_model.state_dict()
    found = load_expert_model(folder)[0].state_dict()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    (folder / "part-1.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="part-1.safetensors cannot be read"):
        load_expert_model(folder)


def saved(model: ExpertModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    save_expert_model(stir(model), tokenizer, folder)
    return folder


def test_nothing_is_stored_twice_and_factors_not_at_all(
    tiny_expert_model: ExpertModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    folder = saved(tiny_expert_model, tiny_tokenizer, tmp_path / "model")
    names = set(load_file(folder / "model.safetensors"))
    assert not any("factor_" in name or "lm_head" in name for name in names)
    assert sum("hidden.weight" in name for name in names) == 1
    assert "assembler.out.bias" in names


def test_training_a_loaded_model_leaves_its_file_alone(
    tiny_expert_model: ExpertModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_batch: Tensor,
    tmp_path: Path,
) -> None:
    folder = saved(tiny_expert_model, tiny_tokenizer, tmp_path / "model")
    before = (folder / "model.safetensors").read_bytes()
    loaded, _ = load_expert_model(folder)
    optimizer = torch.optim.SGD(loaded.trainable_parameters(), lr=1.0)
    loaded(tiny_batch, labels=tiny_batch).loss.backward()
    optimizer.step()
    loaded.set_graph(replace(loaded.graph, order_LE=loaded.graph.order_LE.flip(1)))
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_second_save_replaces_the_first(
    tiny_expert_model: ExpertModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    folder = saved(tiny_expert_model, tiny_tokenizer, tmp_path / "model")
    loaded, _ = load_expert_model(folder)
    loaded.expert_layers[0].gate_bias_E.data.fill_(7.0)
    save_expert_model(loaded, tiny_tokenizer, folder)
    again, _ = load_expert_model(folder)
    assert bool((again.expert_layers[0].gate_bias_E == 7.0).all())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


Damage = Callable[[Path], None]


def edit_config(**changes: object) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "expert_config.json"
        values = json.loads(path.read_text())
        values["samv2"] |= {k: v for k, v in changes.items() if k in values["samv2"]}
        values |= {k: v for k, v in changes.items() if k not in values["samv2"]}
        path.write_text(json.dumps(values))

    return damage


def edit_weights(change: Callable[[dict[str, Tensor]], None]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        weights = {name: value.clone() for name, value in load_file(path).items()}
        change(weights)
        path.unlink()
        save_file(weights, path)

    return damage


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


MLP = "model.layers.1.mlp."


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "expert_config.json").unlink(), "holds no expert graph"),
        (lambda f: (f / "expert_config.json").write_text("{"), "holds no expert graph"),
        (
            lambda f: (f / "expert_config.json").write_bytes(b"\xff"),
            "holds no expert graph",
        ),
        (
            lambda f: (f / "expert_config.json").write_text("{}"),
            "samv2 bootstrap MODEL",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "weights lack"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer in .* cannot be read"),
        (cut, "cannot be read"),
        (edit_config(model_type="nonsense"), "describes no model"),
        (edit_config(layers=[0, 9]), r"converts layers \[9\] of a model of 3"),
        (edit_config(num_shared=7), "experts_per_token is 4; with 7 shared"),
        (edit_config(hidden_size=128), "do not fit its config"),
        (edit_config(vocab_size=100), "do not fit its config"),
        (edit_config(assembler_width=7), "do not fit its config"),
        (edit_config(layers=[0, 1]), "layer_embedding.weight"),
        (edit_weights(lambda w: w.pop(MLP + "gate_EFD")), f"lack {MLP}gate_EFD"),
        (edit_weights(lambda w: w.pop(MLP + "mix_E")), "do not fit.*mix_E"),
        (
            edit_weights(lambda w: w.pop("model.embed_tokens.weight")),
            "lack model.embed",
        ),
        (edit_weights(lambda w: w.pop("assembler.out.bias")), "do not fit"),
        (edit_weights(lambda w: w.update(x=torch.ones(1))), r"unexpected \['x'\]"),
        *(
            (
                edit_weights(lambda w, part=part: w.pop(f"{MLP}repair_4_{part}")),
                f"lack {MLP}repair_4_{part}",
            )
            for part in ("down_EFD", "in_QD", "out_QD", "bias_D")
        ),
        (
            edit_config(repaired=[2, 4], logit_scales=[]),
            "lack model.layers.0.mlp.repair_2_down_EFD",
        ),
        (edit_config(repaired=[], logit_scales=[]), "unexpected .*repair_4"),
        (edit_config(repaired=[8]), "a repair for K = 8|lack .*repair_8"),
        (edit_config(visits=[[4, 4]]), r"visits for \[2\] layers.* needs \[3\]"),
        (edit_config(visits=[[4, 9, 4]]), "experts_per_token is 9"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(
    tiny_expert_model: ExpertModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    damage: Damage,
    message: str,
) -> None:
    folder = saved(tiny_expert_model, tiny_tokenizer, tmp_path / "model")
    damage(folder)
    with pytest.raises(ModelError, match=message):
        load_expert_model(folder)


def test_expert_models_are_told_from_dense_ones(
    tiny_expert_model: ExpertModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_llama_folder: Path,
    tmp_path: Path,
) -> None:
    assert is_expert_model(saved(tiny_expert_model, tiny_tokenizer, tmp_path / "m"))
    assert not is_expert_model(tiny_llama_folder)
    assert not is_expert_model(tmp_path / "missing")
