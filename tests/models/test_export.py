"""Expert models as plain Llamas."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from samv2.common.errors import ModelError
from samv2.experts.moe_layers import WalkOptions
from samv2.models.expert_model import ExpertModel
from samv2.models.export import export_dense
from tests.helpers import (
    VOCAB,
    assert_close,
    convert,
    generator,
    logits_of,
    randn,
    stir,
)

EVERY = WalkOptions(experts_per_token=8, use_assembler=False)


@pytest.mark.parametrize("layers", ["all", "1"])
def test_the_export_is_the_model_at_k_equal_to_e(
    tiny_llama: LlamaForCausalLM,
    tiny_calibration: Tensor,
    tiny_batch: Tensor,
    layers: str,
) -> None:
    overrides = [f"experts.layers={layers}"]
    model = stir(convert(tiny_llama, tiny_calibration, overrides).model)
    dense = export_dense(model)
    assert type(dense) is LlamaForCausalLM
    expected = logits_of(model, tiny_batch, walk_options=EVERY)
    assert_close("logits", logits_of(dense, tiny_batch), expected, "logits")


LOAD_PLAIN = """
import sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert not sys.modules.get("samv2")
try:
    import samv2
except ImportError:
    with torch.no_grad():
        logits = model(torch.load(sys.argv[2])).logits
    torch.save(logits, sys.argv[3])
"""


def test_an_exported_folder_loads_where_samv2_is_not_installed(
    tiny_expert_model: ExpertModel, tiny_batch: Tensor, tmp_path: Path
) -> None:
    model = stir(tiny_expert_model)
    export_dense(model).save_pretrained(tmp_path / "dense")
    torch.save(tiny_batch, tmp_path / "ids.pt")
    block = "import sys; sys.modules['samv2'] = None\n"
    arguments = [str(tmp_path / name) for name in ("dense", "ids.pt", "logits.pt")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-I", "-c", block + LOAD_PLAIN, *arguments],
        check=True,
        capture_output=True,
        cwd=tmp_path,
        env=environment,
        timeout=120,
    )
    expected = logits_of(model, tiny_batch, walk_options=EVERY)
    assert_close("logits", torch.load(tmp_path / "logits.pt"), expected, "logits")


@pytest.mark.parametrize(
    "overrides, parameter, message",
    [
        ([], "mix_E", "u is not 0"),
        (["experts.chains=true"], "edge_strength_EE", "edges carry data"),
        (["experts.combine=softmax"], None, "experts.combine is 'softmax'"),
    ],
)
def test_what_is_no_plain_ffn_is_not_exported(
    tiny_llama: LlamaForCausalLM,
    tiny_calibration: Tensor,
    overrides: list[str],
    parameter: str | None,
    message: str,
) -> None:
    model = convert(tiny_llama, tiny_calibration, overrides).model
    if parameter is not None:
        getattr(model.expert_layers[2], parameter).data.fill_(0.1)
    with pytest.raises(ModelError, match=message):
        export_dense(model)


def test_a_bfloat16_model_exports_without_rounding(tiny_llama_folder: Path) -> None:
    llama = LlamaForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.bfloat16)
    calibration = torch.randint(VOCAB, (8, 32), generator=generator(0))
    model = convert(llama.eval(), calibration).model
    for layer in model.expert_layers:
        values = randn(*layer.adapter_gate_EFR.shape, seed=layer.layer)
        layer.adapter_gate_EFR.data.copy_(0.05 * values)
    dense = export_dense(model)
    tokens_BS = torch.randint(VOCAB, (2, 24), generator=generator(1))
    full = WalkOptions(experts_per_token=8, use_assembler=False)
    expected = model.float()(tokens_BS, walk_options=full).logits
    assert dense.dtype == torch.float32
    assert_close("logits", dense(tokens_BS).logits, expected, "logits")
