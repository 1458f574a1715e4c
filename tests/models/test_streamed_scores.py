"""Scores of a folder, layer by layer, are those of the loaded model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from samv2.common.errors import ModelError
from samv2.experts.moe_layers import WalkOptions
from samv2.models.dense_layers import DenseLayers
from samv2.models.expert_model import ExpertModel
from samv2.models.perplexity import score_windows
from samv2.models.quantised_blocks import quantise_folder
from samv2.models.save import save_expert_model
from samv2.models.stored_layers import StoredLayers
from samv2.models.streamed_scores import score_folder
from tests.helpers import convert


@pytest.mark.parametrize("layers", ["all", "1"])
@pytest.mark.parametrize("quantised", [False, True])
def test_scores_are_those_of_the_loaded_model(
    tiny_llama: LlamaForCausalLM,
    tiny_llama_folder: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_calibration: Tensor,
    tiny_batch: Tensor,
    tmp_path: Path,
    layers: str,
    quantised: bool,
) -> None:
    made = convert(tiny_llama, tiny_calibration, [f"experts.layers={layers}"])
    save_expert_model(made.model, tiny_tokenizer, tmp_path / "model")
    if quantised:
        quantise_folder(tmp_path / "model")
    source = DenseLayers.open(tiny_llama_folder, dtype=torch.float32)
    heldout = {"one": tiny_batch[:3], "other": tiny_batch[3:]}
    seen: list[tuple[int, int]] = []
    found = score_folder(
        tmp_path / "model",
        source,
        heldout,
        (4, 8),
        progress=lambda *step: seen.append(step),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    model = ExpertModel.from_pretrained(tmp_path / "model")
    assert list(found) == [4, 8]
    for k, scores in found.items():
        options = WalkOptions(experts_per_token=k, use_assembler=False)
        assert list(scores) == ["one", "other"]
        for name, windows_NS in heldout.items():
            expected = score_windows(model, windows_NS, walk_options=options)
            assert scores[name].tokens == expected.tokens
            assert scores[name].nll == pytest.approx(expected.nll, rel=1e-5)


@pytest.mark.parametrize(
    "name, change",
    [
        ("gate_EFD", lambda weights, name: weights.pop(name)),
        ("adapter_up_EFR", lambda weights, name: weights.update({name: torch.ones(3)})),
    ],
)
def test_a_damaged_layer_is_refused_by_name(
    tiny_expert_model: ExpertModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    name: str,
    change: Callable[[dict[str, Tensor], str], None],
) -> None:
    folder = tmp_path / "model"
    save_expert_model(tiny_expert_model, tiny_tokenizer, folder)
    file = folder / "model.safetensors"
    weights = {key: value.clone() for key, value in load_file(file).items()}
    change(weights, f"model.layers.1.mlp.{name}")
    save_file(weights, file)
    stored = StoredLayers(folder)
    stored.experts(0, stored.layer(0))
    with pytest.raises(ModelError, match=f"(?s)weights in {folder} do not fit.*{name}"):
        stored.experts(1, stored.layer(1))
    file.write_bytes(b"")
    with pytest.raises(ModelError, match="model.safetensors cannot be read"):
        StoredLayers(folder)
