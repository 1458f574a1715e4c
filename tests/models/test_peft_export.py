"""Runs at K = E as PEFT adapters of the dense model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from samv2.common.errors import ModelError
from samv2.models.assembler import Assembler
from samv2.models.expert_model import ExpertModel
from samv2.models.export import rejoined_dense
from samv2.models.peft_export import (
    check_is_lora,
    dense_rows,
    export_peft,
    provably_open,
)
from samv2.models.quantised_blocks import quantise_model
from tests.helpers import (
    assert_close,
    convert,
    generator,
    logits_of,
    randn,
    random_llama,
    stir,
)

pytestmark = pytest.mark.filterwarnings(
    # peft asks for it by the name that transformers is about to drop.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
WHOLE = ("experts.experts_per_token=8", "assembler.width=0")


@pytest.fixture
def dense(tiny_llama_folder: Path) -> LlamaForCausalLM:
    """The model that is converted, loaded anew."""
    return LlamaForCausalLM.from_pretrained(tiny_llama_folder).eval()


@pytest.mark.parametrize("layers", ["all", "1"])
@pytest.mark.parametrize("scale", ["2.0", "0.3"])
def test_the_adapter_has_the_logits_of_the_expert_graph(
    tiny_llama: LlamaForCausalLM,
    dense: LlamaForCausalLM,
    tiny_calibration: Tensor,
    tiny_batch: Tensor,
    tmp_path: Path,
    layers: str,
    scale: str,
) -> None:
    overrides = [*WHOLE, f"experts.layers={layers}", f"adapter.scale={scale}"]
    model = stir(convert(tiny_llama, tiny_calibration, overrides).model)
    export_peft(model, dense, tmp_path / "adapter", base="somewhere")
    plain = logits_of(dense, tiny_batch)
    adapted = PeftModel.from_pretrained(dense, tmp_path / "adapter").eval()
    assert adapted.peft_config["default"].base_model_name_or_path == "somewhere"
    expected, found = logits_of(model, tiny_batch), logits_of(adapted, tiny_batch)
    assert float((found - plain).abs().max()) > 0.1
    assert_close("logits", found, expected, "logits")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(stored) == 6 * len(model.expert_layers)


def test_the_adapter_of_the_rejoined_model(
    tiny_llama: LlamaForCausalLM,
    tiny_calibration: Tensor,
    tiny_batch: Tensor,
    tmp_path: Path,
) -> None:
    model = convert(tiny_llama, tiny_calibration, [*WHOLE]).model
    quantise_model(model)
    stir(model)
    rejoined_dense(model).save_pretrained(tmp_path / "base")
    export_peft(model, None, tmp_path / "adapter", base=str(tmp_path / "base"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert_close(
        "logits",
        logits_of(adapted, tiny_batch),
        logits_of(model, tiny_batch),
        "logits",
    )


def test_rejoined_experts_are_the_dense_model_whatever_was_trained(
    tiny_llama: LlamaForCausalLM,
    dense: LlamaForCausalLM,
    tiny_calibration: Tensor,
    tiny_batch: Tensor,
) -> None:
    overrides = ["experts.combine=softmax", "experts.chains=true"]
    model = stir(convert(tiny_llama, tiny_calibration, overrides).model)
    for layer in model.expert_layers:
        layer.edge_strength_EE.data.fill_(0.5)
    found = logits_of(rejoined_dense(model), tiny_batch)
    assert_close("logits", found, logits_of(dense, tiny_batch), "logits")


def test_rows_are_found_where_two_are_equal(
    tiny_llama: LlamaForCausalLM, tiny_calibration: Tensor
) -> None:
    mlp = tiny_llama.model.layers[1].mlp
    with torch.no_grad():
        mlp.gate_proj.weight[5] = mlp.gate_proj.weight[90]
        mlp.up_proj.weight[5] = mlp.up_proj.weight[90]
        mlp.down_proj.weight[:, 5] = mlp.down_proj.weight[:, 90]
    weights = mlp.gate_proj.weight.detach().clone()
    model = convert(tiny_llama, tiny_calibration, [*WHOLE, "experts.layers=1"]).model
    layer = model.expert_layers[0]
    order_M = dense_rows(layer, mlp, 1)
    assert sorted(order_M.tolist()) == list(range(128))
    assert torch.equal(layer.gate_EFD.flatten(0, 1)[order_M], weights)


@pytest.mark.parametrize(
    ("overrides", "parameter", "message"),
    [
        (["experts.experts_per_token=4"], None, "experts_per_token is 4 of 8"),
        ([*WHOLE], "mix_E", "u is not 0"),
        ([*WHOLE, "experts.chains=true"], "edge_strength_EE", "edges carry data"),
        ([*WHOLE, "experts.combine=softmax"], None, "combine is 'softmax'"),
    ],
)
def test_what_is_no_lora_is_refused(
    tiny_llama: LlamaForCausalLM,
    dense: LlamaForCausalLM,
    tiny_calibration: Tensor,
    tmp_path: Path,
    overrides: list[str],
    parameter: str | None,
    message: str,
) -> None:
    model = convert(tiny_llama, tiny_calibration, overrides).model
    if parameter is not None:
        getattr(model.expert_layers[2], parameter).data.fill_(0.1)
    with pytest.raises(ModelError, match=message):
        export_peft(model, dense, tmp_path / "adapter", base="")
    assert not (tmp_path / "adapter").exists()


def test_experts_that_edits_cut_off_are_named(
    tiny_llama: LlamaForCausalLM, tiny_calibration: Tensor
) -> None:
    model = convert(tiny_llama, tiny_calibration, [*WHOLE]).model
    mask_EE = model.expert_layers[1].edge_mask_EE
    mask_EE[:] = torch.eye(8, dtype=torch.bool)
    mask_EE[0, 0] = False  # a shared expert, which is visited all the same
    check_is_lora(model)
    mask_EE[6, 6] = False
    with pytest.raises(ModelError, match=r"experts \[6\] of converted layer 1"):
        check_is_lora(model)
    mask_EE[3, 6] = True
    check_is_lora(model)


def whole_with_assembler(llama: LlamaForCausalLM, text: Tensor) -> ExpertModel:
    """At K = E, with an assembler of 4 units."""
    overrides = ["experts.experts_per_token=8", "assembler.width=4"]
    return convert(llama, text, overrides).model


def test_an_assembler_is_tried_on_text_where_it_is_not_proved_open(
    tiny_llama: LlamaForCausalLM, tiny_calibration: Tensor, tiny_batch: Tensor
) -> None:
    model = whole_with_assembler(tiny_llama, tiny_calibration)
    check_is_lora(model)  # as it starts, it closes nothing
    assembler = model.assembler
    assert assembler is not None and provably_open(assembler)
    assembler.out.weight.data.copy_(randn(36, 4, seed=1) * 0.2)
    assert not provably_open(assembler)
    with pytest.raises(ModelError, match="no text to try it on; .*assembler.width = 0"):
        check_is_lora(model)
    check_is_lora(model, tiny_batch)
    assembler.out.bias.data[7] = -4.0
    assembler.out.bias.data[35] = -4.0  # the entry of the last expert
    for layer in model.expert_layers:
        layer.edge_mask_EE[:] = torch.eye(8, dtype=torch.bool)
    with pytest.raises(ModelError, match="closes experts of converted layer 0 for 128"):
        check_is_lora(model, tiny_batch)


def test_the_proof_holds_for_the_worst_context() -> None:
    """Where it says open, random and adversarial contexts open every entry."""
    proved = 0
    for seed in range(40):
        made = Assembler(
            model_width=6, num_layers=2, num_experts=3, hidden_width=4, seed=seed
        )
        made.out.weight.data.copy_(0.04 * seed * randn(6, 4, seed=seed))
        contexts = torch.randn(512, 6, generator=generator(seed))
        contexts[:4] = made.hidden.weight.detach()[:, :6]
        contexts[4:8] = -made.hidden.weight.detach()[:, :6]
        entries = [0, 3, 5]
        lowest = min(
            float(made.logits(contexts, layer).detach()[:, entries].min())
            for layer in (0, 1)
        )
        if provably_open(made):
            proved += 1
            assert lowest > 0
    assert 5 < proved < 40


def test_another_dense_model_is_refused(
    tiny_llama: LlamaForCausalLM, tiny_calibration: Tensor, tmp_path: Path
) -> None:
    model = convert(tiny_llama, tiny_calibration, [*WHOLE]).model
    with pytest.raises(ModelError, match="128 of 128 FFN rows of layer 0.*--base"):
        export_peft(model, random_llama(seed=3), tmp_path / "adapter", base="")
    quantise_model(model)
    with pytest.raises(ModelError, match="NF4"):
        export_peft(model, random_llama(seed=3), tmp_path / "adapter", base="")
