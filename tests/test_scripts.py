"""The scripts that are not commands of ``samv2``."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import linear
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from samv2.common.config import field_kinds
from samv2.common.settings_checks import CHOICES
from samv2.models.dense_layers import DenseLayers

SCRIPT = Path(__file__).parents[1] / "scripts" / "random_llama.py"


@pytest.fixture(scope="module")
def random_llama() -> ModuleType:
    spec = importlib.util.spec_from_file_location("random_llama", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {}
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, framework="pt") as weights:
            found[name] = weights.get_tensor(name)
    stored = sum(t.numel() * t.itemsize for t in found.values())
    assert index["metadata"]["total_size"] == stored
    return found


@torch.no_grad()
def test_a_random_checkpoint_loads_whole_and_layer_by_layer(
    random_llama: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "made" / "tiny"
    random_llama.main(["--output", str(folder), "--shape", "tiny"])
    assert "tiny, 3 layers, 0.1 million parameters" in capsys.readouterr().out
    assert len(list(folder.glob("model-*.safetensors"))) >= 2

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "déjà vu: any bytes ☃"
    ids_1S = torch.tensor([tokenizer(text).input_ids])
    assert tokenizer.decode(ids_1S[0]) == text
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    expected = model(ids_1S).logits
    assert bool(expected.isfinite().all())
    assert model.config.eos_token_id == tokenizer.eos_token_id

    dense = DenseLayers.open(folder, dtype=torch.bfloat16)
    inputs = dense.attention_inputs(ids_1S.shape[1])
    hidden_1SD = dense.embed(ids_1S)
    for index in range(dense.num_layers):
        hidden_1SD = dense.layer(index)(hidden_1SD, **inputs.of_layer(index))
    actual = linear(dense.final_norm()(hidden_1SD), dense.head_weight())
    assert torch.equal(actual, expected)


def test_the_weights_have_the_promised_spread_and_follow_the_seed(
    random_llama: ModuleType, tmp_path: Path
) -> None:
    made = {}
    for name, options in {
        "first": ["--seed", "1"],
        "again": ["--seed", "1"],
        "other": ["--seed", "2"],
    }.items():
        options += ["--layers", "2", "--dtype", "float32", "--shape", "tiny"]
        random_llama.main(["--output", str(tmp_path / name), *options])
        made[name] = tensors_of(tmp_path / name)
    first = made["first"]
    assert len([name for name in first if "input_layernorm" in name]) == 2
    for name, tensor in first.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, made["again"][name])
        if tensor.dim() == 1:
            assert bool((tensor == 1).all())
            continue
        assert not torch.equal(tensor, made["other"][name])
        want = 0.01 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
        # Four standard errors of the spread of 2,048 numbers, the smallest matrix.
        assert abs(float(tensor.std()) / want - 1) < 4 / (2 * 2048) ** 0.5


def test_a_given_tokenizer_is_copied_if_it_fits(
    random_llama: ModuleType,
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given, folder = tmp_path / "given", tmp_path / "made"
    tiny_tokenizer.save_pretrained(given)
    options = ["--output", str(folder), "--shape", "tiny", "--tokenizer", str(given)]
    random_llama.main(options)
    text = "def main() -> None:"
    copied = AutoTokenizer.from_pretrained(folder)
    assert copied(text).input_ids == tiny_tokenizer(text).input_ids

    shape = random_llama.SHAPES["tiny"] | {"vocab_size": 400}
    monkeypatch.setitem(random_llama.SHAPES, "tiny", shape)
    options[1] = str(tmp_path / "smaller")
    with pytest.raises(SystemExit, match="512 tokens, the model's vocabulary has 400"):
        random_llama.main(options)
    assert not (tmp_path / "smaller").exists()


def test_what_cannot_be_written_is_refused(
    random_llama: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").write_text("work of weeks")
    for output in (tmp_path, tmp_path / "mine"):
        with pytest.raises(SystemExit, match="exists and is not an empty folder"):
            random_llama.main(["--output", str(output), "--shape", "tiny"])
    assert (tmp_path / "mine").read_text() == "work of weeks"
    options = ["--output", str(tmp_path / "new"), "--shape", "tiny"]
    with pytest.raises(SystemExit, match="--layers is 0; a model needs at least 1"):
        random_llama.main([*options, "--layers", "0"])
    with pytest.raises(SystemExit, match="no readable tokenizer"):
        random_llama.main([*options, "--tokenizer", str(tmp_path)])
    full = SimpleNamespace(free=0)
    monkeypatch.setattr(random_llama.shutil, "disk_usage", lambda _: full)
    with pytest.raises(SystemExit, match="0.0 GB free; use fewer --layers"):
        random_llama.main(options)
    assert not (tmp_path / "new").exists()


def test_the_seven_billion_shape_is_llama_2_7bs(random_llama: ModuleType) -> None:
    config = random_llama.LlamaConfig(**random_llama.SHAPES["llama-2-7b"])
    shapes = random_llama.tensor_shapes(config)
    assert sum(map(random_llama.math.prod, shapes.values())) == 6_738_415_616
    shards = list(random_llama.divide(shapes, torch.bfloat16))
    assert [name for shard in shards for name in shard] == list(shapes)
    for shard in shards:
        size = sum(2 * random_llama.math.prod(shapes[name]) for name in shard)
        assert size <= random_llama.SHARD_BYTES
    shapes = random_llama.tensor_shapes(
        random_llama.LlamaConfig(**random_llama.SHAPES["smollm2-135m"])
    )
    assert sum(map(random_llama.math.prod, shapes.values())) == 134_515_008


def test_the_page_of_settings_is_what_the_script_writes() -> None:
    path = SCRIPT.with_name("write_settings_doc.py")
    spec = importlib.util.spec_from_file_location("write_settings_doc", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = script.PAGE.read_text(encoding="utf-8")
    assert page == script.page(), "run: python scripts/write_settings_doc.py"
    for key in field_kinds():
        assert page.count(f"| `{key}` |") == 1
    for key, values in CHOICES.items():
        row = next(line for line in page.splitlines() if f"| `{key}` |" in line)
        assert all(f"`{value}`" in row for value in values)


def test_help_teaches() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    for word in ("--tokenizer", "llama-2-7b", "samv2 bootstrap", "random weights"):
        assert word in done.stdout
