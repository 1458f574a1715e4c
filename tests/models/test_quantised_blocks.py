"""Models and folders with NF4 expert blocks: what they hold, compute, and refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from samv2.common.errors import ModelError
from samv2.experts.moe_layers import WalkOptions
from samv2.models import quantised_blocks
from samv2.models.distilled_folder import distill_folder
from samv2.models.expert_model import ExpertModel
from samv2.models.export import export_dense
from samv2.models.quantised_blocks import quantise_folder, quantise_model
from samv2.models.save import (
    conversion_settings,
    expert_fingerprint,
    load_expert_model,
    save_expert_model,
)
from samv2_kernels.nf4 import BLOCK, dequantise, quantise
from tests.helpers import (
    assert_close,
    convert,
    logits_of,
    random_llama,
    stir,
    tiny_settings,
)

KINDS = ("gate", "up", "down", "repair_2_down", "repair_4_down")
CONVERTED = (0, 2)
OVERRIDES = ["experts.layers=0,2", "experts.other_k=2"]
ODD = {"hidden_size": 40, "intermediate_size": 40}
"""Of a model whose experts have 5 x 40 weights: three blocks of 64, and one of 8."""


@pytest.fixture(scope="module", params=["fp32", "bf16", "odd"])
def float_folder(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama_folder: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_calibration: Tensor,
) -> Path:
    """Layers 0 and 2 converted, K = 4 and 2 repaired, adapters that are not zero."""
    folder = tmp_path_factory.mktemp(f"float-{request.param}") / "model"
    dtype = torch.bfloat16 if request.param == "bf16" else torch.float32
    llama = LlamaForCausalLM.from_pretrained(tiny_llama_folder, dtype=dtype).eval()
    if request.param == "odd":
        llama = random_llama(**ODD)
    model = stir(convert(llama, tiny_calibration, OVERRIDES).model)
    save_expert_model(model, tiny_tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def nf4_folder(float_folder: Path) -> Path:
    """The same with NF4 blocks."""
    folder = float_folder.parent / "nf4"
    shutil.copytree(float_folder, folder)
    quantise_folder(folder)
    return folder


def twin(float_folder: Path) -> ExpertModel:
    """The float model with what its NF4 blocks stand for."""
    model, _ = load_expert_model(float_folder)
    for layer in model.expert_layers:
        for name in layer.block_names:
            block = getattr(layer, name)
            setattr(layer, name, dequantise(quantise(block), block.dtype))
    return model


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("k", [2, 3, 4, 8])
def test_logits_are_those_of_the_unpacked_weights(
    float_folder: Path, nf4_folder: Path, tiny_batch: Tensor, k: int
) -> None:
    """At K with a repair, without one, and at K = E."""
    model, plain = load_expert_model(nf4_folder)[0], twin(float_folder)
    options = WalkOptions(experts_per_token=k)
    found = logits_of(model, tiny_batch, walk_options=options)
    assert torch.equal(found, logits_of(plain, tiny_batch, walk_options=options))
    before, _ = load_expert_model(float_folder)
    assert not torch.equal(found, logits_of(before, tiny_batch, walk_options=options))


@pytest.mark.parametrize("k", [4, 8])
def test_gradients_are_those_of_the_unpacked_weights(
    float_folder: Path, nf4_folder: Path, tiny_batch: Tensor, k: int
) -> None:
    """Also after an evaluation, which must not repack anything."""
    gradients = []
    for model in (load_expert_model(nf4_folder)[0], twin(float_folder)):
        options = WalkOptions(experts_per_token=k)
        logits_of(model, tiny_batch, walk_options=options)
        model.train()
        model(tiny_batch, labels=tiny_batch, walk_options=options).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    found, expected = gradients
    assert found.keys() == expected.keys()
    moved = 0
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        if value is not None:
            assert torch.equal(found[name], value), name
            moved += "adapter" in name and bool(value.any())
    assert moved == 3 * len(CONVERTED)


def test_a_step_of_training_lowers_the_loss_and_leaves_the_blocks(
    nf4_folder: Path, tiny_batch: Tensor
) -> None:
    model, _ = load_expert_model(nf4_folder)
    before = {n: b.clone() for n, b in model.named_buffers() if "_EH" in n}
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=5e-3)
    losses = []
    for _ in range(4):
        loss = model(tiny_batch, labels=tiny_batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    for name, buffer in model.named_buffers():
        assert "_EH" not in name or torch.equal(buffer, before[name]), name


def test_it_generates_what_the_unpacked_weights_do(
    float_folder: Path, nf4_folder: Path, tiny_batch: Tensor
) -> None:
    model, plain = load_expert_model(nf4_folder)[0], twin(float_folder)
    found = model.generate(tiny_batch[:1, :9], max_new_tokens=6, do_sample=False)
    expected = plain.generate(tiny_batch[:1, :9], max_new_tokens=6, do_sample=False)
    assert torch.equal(found, expected)


def test_the_folder_holds_packed_blocks_and_all_else_as_it_was(
    float_folder: Path, nf4_folder: Path
) -> None:
    before, after = tensors_of(float_folder), tensors_of(nf4_folder)
    packed = set()
    for index in CONVERTED:
        for kind in KINDS:
            name = f"model.layers.{index}.mlp.{kind}"
            block_EFD = before.pop(f"{name}_EFD")
            experts, weights = len(block_EFD), block_EFD[0].numel()
            codes, absmax = after[f"{name}_codes_EH"], after[f"{name}_absmax_EN"]
            assert codes.dtype == torch.uint8 and absmax.dtype == torch.float32
            assert codes.nbytes == experts * weights // 2
            assert absmax.nbytes == 4 * experts * -(-weights // BLOCK)
            expected = quantise(block_EFD)
            assert torch.equal(codes, expected.codes_EH)
            assert torch.equal(absmax, expected.absmax_EN)
            packed |= {f"{name}_codes_EH", f"{name}_absmax_EN"}
    assert after.keys() == before.keys() | packed
    for name, value in before.items():
        assert after[name].dtype == value.dtype and torch.equal(after[name], value)
    files = {path.name for path in nf4_folder.glob("*.safetensors")}
    assert files == {
        "other.safetensors",
        *(f"layer-0000{n}.safetensors" for n in "012"),
    }


def test_loading_unpacks_nothing(nf4_folder: Path) -> None:
    model, tokenizer = load_expert_model(nf4_folder)
    assert model.expert_config.quantise == "nf4"
    assert conversion_settings(nf4_folder)["experts.quantise"] == "nf4"
    assert not any(name.endswith("_EFD") for name, _ in model.named_buffers())
    assert not any(buffer.is_meta for buffer in model.buffers())
    for layer in model.expert_layers:
        assert layer.packed == tuple(f"{kind}_EFD" for kind in KINDS)
    assert tokenizer("def f").input_ids


def test_a_model_in_memory_is_packed_alike(
    float_folder: Path,
    nf4_folder: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    """And it may be saved and loaded again."""
    model, _ = load_expert_model(float_folder)
    quantise_model(model)
    save_expert_model(model, tiny_tokenizer, tmp_path / "saved")
    found, expected = tensors_of(tmp_path / "saved"), tensors_of(nf4_folder)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    loaded, _ = load_expert_model(tmp_path / "saved")
    assert loaded.expert_config == load_expert_model(nf4_folder)[0].expert_config


def test_the_export_is_the_unpacked_model_at_k_equal_to_e(
    float_folder: Path, nf4_folder: Path, tiny_batch: Tensor
) -> None:
    """In float32, also where the blocks were bfloat16: NF4 stands for float32 numbers."""
    model, _ = load_expert_model(nf4_folder)
    dense = export_dense(model)
    whole = WalkOptions(experts_per_token=8, use_assembler=False)
    expected = logits_of(model.float(), tiny_batch, walk_options=whole)
    assert type(dense) is LlamaForCausalLM
    assert_close("logits", logits_of(dense, tiny_batch), expected, "logits")


def test_the_fingerprint_tells_of_one_code(nf4_folder: Path) -> None:
    def fingerprint(change: bool, part: str = "repair_2_down_codes_EH") -> str:
        model, _ = load_expert_model(nf4_folder)
        if change:
            stored = getattr(model.expert_layers[1], part)
            changed = stored.clone()
            changed[3, 7] += 1
            setattr(model.expert_layers[1], part, changed)
        return expert_fingerprint(model)

    assert fingerprint(False) == fingerprint(False)
    found = {fingerprint(False), fingerprint(True)}
    assert len(found | {fingerprint(True, "gate_codes_EH")}) == 3


Damage = Callable[[dict[str, Tensor]], None]
MLP = "model.layers.2.mlp."


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Damage:
    def damage(weights: dict[str, Tensor]) -> None:
        weights[MLP + name] = change(weights[MLP + name]).contiguous()

    return damage


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda w: w.pop(MLP + "gate_codes_EH"), f"lack {MLP}gate_codes_EH"),
        (
            lambda w: w.pop(MLP + "repair_2_down_absmax_EN"),
            f"lack {MLP}repair_2_down_absmax_EN",
        ),
        (
            changed("up_codes_EH", lambda t: t[:, :-1]),
            rf"{MLP}up_codes_EH has shape \(8, \d+\)",
        ),
        (
            changed("up_codes_EH", lambda t: t.to(torch.int16)),
            f"{MLP}up_codes_EH has .*torch.int16; 8 NF4 experts",
        ),
        (
            changed("down_absmax_EN", lambda t: t[1:]),
            rf"{MLP}down_absmax_EN has shape \(7,",
        ),
        (
            changed("down_absmax_EN", lambda t: t * torch.nan),
            f"{MLP}down_absmax_EN has values that are negative or not finite",
        ),
    ],
)
def test_damaged_blocks_are_refused_by_name(
    nf4_folder: Path, tmp_path: Path, damage: Damage, message: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(nf4_folder, folder)
    file = folder / "layer-00002.safetensors"
    weights = {name: value.clone() for name, value in load_file(file).items()}
    damage(weights)
    save_file(weights, file)
    with pytest.raises(ModelError, match=f"weights in {folder} do not fit.*{message}"):
        load_expert_model(folder)


def with_config(source: Path, folder: Path, **changes: object) -> Path:
    shutil.copytree(source, folder)
    path = folder / "expert_config.json"
    values = json.loads(path.read_text())
    values["samv2"] |= changes
    path.write_text(json.dumps(values))
    return folder


def test_a_config_that_does_not_fit_the_blocks_is_refused(
    float_folder: Path, nf4_folder: Path, tmp_path: Path
) -> None:
    for source, quantise, message in (
        (nf4_folder, "none", "lack .*gate_EFD"),
        (float_folder, "nf4", "lack .*gate_codes_EH"),
        (nf4_folder, "int3", "quantise 'int3', this version of samv2 knows none, nf4"),
    ):
        folder = with_config(source, tmp_path / quantise, quantise=quantise)
        with pytest.raises(ModelError, match=message):
            load_expert_model(folder)


def test_folders_of_earlier_versions_hold_floats(
    float_folder: Path, tmp_path: Path
) -> None:
    folder = with_config(float_folder, tmp_path / "old")
    path = folder / "expert_config.json"
    values = json.loads(path.read_text())
    assert values["samv2"].pop("quantise") == "none"
    path.write_text(json.dumps(values))
    assert load_expert_model(folder)[0].expert_config.quantise == "none"


def test_what_is_packed_is_neither_packed_nor_distilled_again(
    nf4_folder: Path, tiny_llama_folder: Path, tiny_batch: Tensor
) -> None:
    with pytest.raises(ModelError, match=f"blocks in {nf4_folder} are nf4 already"):
        quantise_folder(nf4_folder)
    with pytest.raises(ModelError, match="train first, quantise after"):
        distill_folder(nf4_folder, tiny_llama_folder, tiny_batch, {}, tiny_settings())


def test_a_crash_leaves_the_folder_as_it_was(
    float_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(float_folder, folder)

    def crash(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quantised_blocks, "write_config", crash)
    seen: list[tuple[int, int]] = []
    with pytest.raises(KeyboardInterrupt):
        quantise_folder(folder, progress=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    found, expected = tensors_of(folder), tensors_of(float_folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
