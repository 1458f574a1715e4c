"""A dense checkpoint layer by layer gives the model's own bits; damage is refused."""

from __future__ import annotations

import gc
import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from samv2.common.errors import ModelError
from samv2.models.dense_layers import DenseLayers
from tests.helpers import VOCAB, generator, tiny_config

UP = "model.layers.1.mlp.up_proj.weight"
WINDOW = 8
DTYPES = [torch.float32, torch.bfloat16]


def make(kind: str, **changes: Any) -> PreTrainedModel:
    """A random model whose norms and biases are not at their start values either."""
    sizes = tiny_config(**changes).to_dict()
    dropped = ("model_type", "architectures", "dtype", "transformers_version")
    sizes = {key: value for key, value in sizes.items() if key not in dropped}
    models: dict[str, Callable[[], PreTrainedModel]] = {
        "llama": lambda: LlamaForCausalLM(tiny_config(**changes)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**sizes)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**sizes)),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models[kind]()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def run(dense: DenseLayers, tokens_BS: Tensor) -> Tensor:
    """Logits (B, S, V), one layer in memory at a time."""
    inputs = dense.attention_inputs(tokens_BS.shape[1])
    hidden_BSD = dense.embed(tokens_BS)
    for index in range(dense.num_layers):
        hidden_BSD = dense.layer(index)(hidden_BSD, **inputs.of_layer(index))
    return linear(dense.final_norm()(hidden_BSD), dense.head_weight())


def assert_same_logits(folder: Path, dtype: torch.dtype, length: int = 24) -> None:
    tokens_BS = torch.randint(VOCAB, (3, length), generator=generator(1))
    dense = DenseLayers.open(folder, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        expected = model(tokens_BS).logits
    actual = run(dense, tokens_BS)
    assert actual.dtype == dtype
    assert torch.equal(actual, expected)
    assert dense.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {
        "_name_or_path": ""
    }


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make("llama").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["50KB", "1GB"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_layer_by_layer_gives_the_models_bits(
    kind: str, shard: str, tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = make(kind, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "50KB")
    assert_same_logits(tmp_path, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mistral", dict(sliding_window=WINDOW)),
        ("mistral", dict(sliding_window=None)),
        (
            "qwen2",
            dict(sliding_window=WINDOW, use_sliding_window=True, max_window_layers=1),
        ),
        ("qwen2", dict(sliding_window=WINDOW, use_sliding_window=False)),
        ("llama", dict(sliding_window=WINDOW)),
        ("llama", dict(head_dim=32)),
        ("mistral", dict(head_dim=8)),
        ("llama", dict(attention_bias=True)),
        (
            "llama",
            dict(
                rope_parameters={
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            ),
        ),
        (
            "llama",
            dict(
                max_position_embeddings=16,
                rope_parameters={
                    "rope_type": "dynamic",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                },
            ),
        ),
    ],
)
def test_variants_of_attention_give_the_models_bits(
    kind: str, changes: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    make(kind, **changes).save_pretrained(tmp_path)
    for length in (1, WINDOW, WINDOW + 1, 3 * WINDOW):
        assert_same_logits(tmp_path, dtype, length)


def test_a_window_is_applied_to_the_layers_that_have_one(tmp_path: Path) -> None:
    settings = dict(sliding_window=WINDOW, use_sliding_window=True, max_window_layers=1)
    make("qwen2", **settings).save_pretrained(tmp_path)
    dense = DenseLayers.open(tmp_path, dtype=torch.float32)
    first, second, third = dense.attention_inputs(WINDOW + 2).masks
    assert first is None
    assert second is third
    seen_S = second[0, 0].sum(dim=1)
    assert seen_S.tolist() == [*range(1, WINDOW + 1), WINDOW, WINDOW]


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_weights_of_every_plain_dtype_are_rounded_once(
    stored: torch.dtype, dtype: torch.dtype, folder: Path
) -> None:
    rewrite(folder, lambda t: t.update({k: v.to(stored) for k, v in t.items()}))
    assert_same_logits(folder, dtype)


@pytest.mark.parametrize("change", ["no prefix", "head only", "head twice", "inv_freq"])
def test_folders_that_transformers_reads_differently_named(
    change: str, folder: Path
) -> None:
    def apply(tensors: dict[str, Tensor]) -> None:
        embedding = tensors["model.embed_tokens.weight"]
        if change == "no prefix":
            for name in list(tensors):
                tensors[name.removeprefix("model.")] = tensors.pop(name)
        elif change == "inv_freq":
            tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        else:
            tensors["lm_head.weight"] = embedding.clone()
            if change == "head only":
                del tensors["model.embed_tokens.weight"]

    rewrite(folder, apply)
    assert_same_logits(folder, torch.float32)


def test_a_layer_is_fresh_frozen_and_apart_from_its_file(folder: Path) -> None:
    dense = DenseLayers.open(folder, dtype=torch.float32)
    before = (folder / "model.safetensors").read_bytes()
    first, second = dense.layer(0), dense.layer(0)
    assert not first.training
    for module in (first, dense.final_norm()):
        assert not any(parameter.requires_grad for parameter in module.parameters())
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.fill_(7)
        dense.head_weight().fill_(7)
    assert (folder / "model.safetensors").read_bytes() == before
    for again in (second, dense.layer(0)):
        want = make("llama").model.layers[0].state_dict()
        for name, tensor in again.state_dict().items():
            assert torch.equal(tensor, want[name]), name


def test_nothing_that_was_read_stays_alive(folder: Path) -> None:
    dense = DenseLayers.open(folder, dtype=torch.float32)
    layer, norm, head = dense.layer(1), dense.final_norm(), dense.head_weight()
    hidden = dense.embed(torch.zeros(1, 4, dtype=torch.int64))
    storages = [
        weakref.ref(tensor.untyped_storage())
        for tensor in (*layer.parameters(), *norm.parameters(), head, hidden)
    ]
    modules = [weakref.ref(layer), weakref.ref(norm)]
    del layer, norm, head, hidden
    gc.collect()
    assert not any(reference() for reference in modules + storages)


def test_nothing_of_the_folder_stays_open_or_mapped(folder: Path) -> None:
    if not Path("/proc/self/maps").is_file():
        pytest.skip("needs /proc")
    dense = DenseLayers.open(folder, dtype=torch.float32)
    kept = [dense.layer(0), dense.head_weight(), dense.final_norm()]
    kept.append(dense.embed(torch.zeros(1, 4, dtype=torch.int64)))
    assert str(folder) not in Path("/proc/self/maps").read_text()
    files = [
        os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
    ]
    assert not any(file.startswith(str(folder)) for file in files)


def test_reading_leaves_the_global_generator_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    run(DenseLayers.open(folder, dtype=torch.float32), torch.zeros(1, 4).long())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("tied", [True, False])
def test_tensors_outside_the_layers_are_named_once(tied: bool, tmp_path: Path) -> None:
    model = make("llama", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    dense = DenseLayers.open(tmp_path, dtype=torch.bfloat16)
    outside = {
        n for n in load_file(tmp_path / "model.safetensors") if ".layers." not in n
    }
    names = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    assert dense.other_names() == (names[:2] if tied else names)
    assert set(dense.other_names()) == outside
    for name in outside:
        want = model.get_parameter(name).detach().bfloat16()
        assert torch.equal(dense.tensor(name), want)
    with pytest.raises(ModelError, match="tensor 'no.such' is not part of the model"):
        dense.tensor("no.such")


def test_open_reads_no_weights(folder: Path) -> None:
    rewrite(folder, lambda tensors: [t.fill_(torch.nan) for t in tensors.values()])
    DenseLayers.open(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(UP), rf"1 tensor.* missing, first {UP} of shape \(128, 64\)"),
        (
            lambda t: t.update({UP: torch.ones(120, 64)}),
            rf"{UP} in model.safetensors has shape \(120, 64\), it must have \(128, 64\)",
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.bias": torch.ones(128)}),
            "1 tensor.* unknown, first model.layers.1.mlp.up_proj.bias in model.safe",
        ),
        (
            lambda t: t.update({UP: torch.ones(128, 64, dtype=torch.int8)}),
            f"{UP} in model.safetensors is stored as I8, it must be of BF16, F16",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(VOCAB, 64)}),
            "has tie_word_embeddings true, but model.embed_tokens.weight and "
            "lm_head.weight are stored with different values",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(VOCAB - 1, 64)}),
            "lm_head.weight are stored with different values",
        ),
        (
            lambda t: [t.pop(n) for n in list(t) if "embed" in n],
            r"missing, first model.embed_tokens.weight of shape \(512, 64\)",
        ),
    ],
)
def test_refuses_weights_that_do_not_fit_the_config(
    change: Callable[[dict[str, Tensor]], Any], message: str, folder: Path
) -> None:
    rewrite(folder, change)
    with pytest.raises(ModelError, match=message):
        DenseLayers.open(folder, dtype=torch.float32)


def test_names_several_faults_at_once(folder: Path) -> None:
    edit(folder, num_hidden_layers=2, intermediate_size=256)
    with pytest.raises(ModelError) as caught:
        DenseLayers.open(folder, dtype=torch.float32)
    words = ("9 tensor(s) are unknown", "has shape", "2 more", "copy the model again")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_refuses_an_untied_config_without_a_head(folder: Path) -> None:
    edit(folder, tie_word_embeddings=False)
    with pytest.raises(ModelError, match="missing, first lm_head.weight"):
        DenseLayers.open(folder, dtype=torch.float32)


def test_refuses_a_tensor_that_is_in_two_files(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path, max_shard_size="50KB")
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{name} is in .*{first.name}.*{second.name}"):
        DenseLayers.open(tmp_path, dtype=torch.float32)


def test_refuses_a_missing_shard_and_a_missing_file(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path, max_shard_size="50KB")
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(ModelError, match="lacks model-00002"):
        DenseLayers.open(tmp_path, dtype=torch.float32)
    with pytest.raises(ModelError, match="has no config.json"):
        DenseLayers.open(tmp_path / "nothing", dtype=torch.float32)


@pytest.mark.parametrize("size", [0, 4, 100, -100])
def test_refuses_a_truncated_file(size: int, folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, size if size >= 0 else file.stat().st_size + size)
    with pytest.raises(ModelError, match="model.safetensors cannot be read .*damaged"):
        DenseLayers.open(folder, dtype=torch.float32)


def test_refuses_a_file_that_shrank_since_it_was_opened(folder: Path) -> None:
    dense = DenseLayers.open(folder, dtype=torch.float32)
    os.truncate(folder / "model.safetensors", 20_000)
    with pytest.raises(ModelError, match="model.safetensors cannot be read"):
        dense.layer(2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_refuses_weights_that_are_not_finite(value: float, folder: Path) -> None:
    bad = {UP, "model.norm.weight", "model.embed_tokens.weight"}

    def spoil(tensors: dict[str, Tensor]) -> None:
        for name in bad:
            tensors[name].view(-1)[5] = value

    rewrite(folder, spoil)
    dense = DenseLayers.open(folder, dtype=torch.bfloat16)
    dense.layer(0)
    tokens_BS = torch.full((1, 3), 9)
    reads = {
        UP: lambda: dense.layer(1),
        "model.norm.weight": dense.final_norm,
        "model.embed_tokens.weight": lambda: dense.embed(tokens_BS),
    }
    for name, read in reads.items():
        words = f"tensor {name} in .*model.safetensors has 1 of .* NaN or infinite"
        with pytest.raises(ModelError, match=words):
            read()
    with pytest.raises(ModelError, match="NaN or infinite; the checkpoint is damaged"):
        dense.head_weight()


def test_refuses_arguments_out_of_range(folder: Path) -> None:
    dense = DenseLayers.open(folder, dtype=torch.float32)
    for index in (-1, 3):
        with pytest.raises(ModelError, match=rf"layer {index} is not .* layers 0\.\.2"):
            dense.layer(index)
    for token in (-1, VOCAB):
        with pytest.raises(ModelError, match=rf"{token}.* has ids 0\.\.511"):
            dense.embed(torch.tensor([[5, token]]))
    with pytest.raises(ModelError, match="length is 0"):
        dense.attention_inputs(0)
    with pytest.raises(ModelError, match="torch.float16; use torch.float32"):
        DenseLayers.open(folder, dtype=torch.float16)


def test_refuses_other_architectures_by_their_config(tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="'gpt2' cannot become an expert graph"):
        DenseLayers.open(tmp_path, dtype=torch.float32)


def test_refuses_a_config_that_describes_no_model(folder: Path) -> None:
    edit(folder, rope_parameters={"rope_type": "unheard-of", "rope_theta": 1e4})
    with pytest.raises(ModelError, match="config.json (describes no model|cannot be)"):
        DenseLayers.open(folder, dtype=torch.float32)
