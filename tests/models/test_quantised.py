"""NF4 weights with LoRA: right gradients after an evaluation, and wrong ones without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from tokenizers import Tokenizer, models
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from samv2.common.errors import ModelError
from samv2.models.llama_loader import load_llama
from samv2.models.model_files import model_fingerprint
from samv2.models.quantised import (
    attach_qlora,
    evaluation_mode,
    keep_linear4bit_trainable,
    load_llama_nf4,
)

# peft 0.21 asks transformers 5.23 for a property by its old name.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

packing_cpu = pytest.mark.skipif(
    not has_avx512bf16(),
    reason="bitsandbytes repacks weights only on a CPU with AVX512-BF16",
)

IDS = torch.arange(48).reshape(2, 24) * 11 % 256
LINEARS = 14  # 7 a layer, 2 layers; the output head is not quantised


def save_tiny(folder: Path, intermediate_size: int = 128) -> Path:
    """A random Llama; repacking needs outputs in 32s and inputs in 64s."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {chr(0x4E00 + i): i for i in range(256)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, []))
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def nf4(folder: Path, dtype: torch.dtype, double_quant: bool = False) -> nn.Module:
    return load_llama_nf4(
        str(folder), compute_dtype=dtype, double_quant=double_quant
    ).model


def linears(model: nn.Module) -> dict[str, Linear4bit]:
    return {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}


def dense_twin(folder: Path, quantised: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same model with the dequantised weights in ordinary layers."""
    twin = load_llama(str(folder), dtype=dtype).model
    with torch.no_grad():
        for name, layer in linears(quantised).items():
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            twin.get_submodule(name).weight.copy_(weight)
    return twin


def qlora(model: nn.Module) -> PeftModel:
    """LoRA whose B is not zero, so that A has a gradient as well."""
    adapted = attach_qlora(model, rank=4, alpha=8, seed=7)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=generator)
    return adapted


def lora_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def least_cosine(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    assert len(a) == 12
    pairs = ((a[name].flatten(), b[name].flatten()) for name in a)
    return min(float(F.cosine_similarity(x, y, dim=0)) for x, y in pairs)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_right_after_an_evaluation(
    folder: Path, dtype: torch.dtype, double_quant: bool
) -> None:
    base = nf4(folder, dtype, double_quant)
    twin = qlora(dense_twin(folder, base, dtype))
    model = qlora(base)
    with torch.no_grad(), evaluation_mode(model):
        logits = model(input_ids=IDS).logits
    with torch.no_grad():
        want = twin.eval()(input_ids=IDS).logits
    # float32 does the same sums; bfloat16 may round a logit of 1.5 by 2^-7.
    torch.testing.assert_close(
        logits, want, rtol=0, atol=1e-5 if dtype == torch.float32 else 2**-7
    )
    gradients, right = lora_gradients(model), lora_gradients(twin)
    assert least_cosine(gradients, right) > 0.99
    for name, gradient in right.items():
        ratio = float(gradients[name].norm() / gradient.norm())
        assert ratio == pytest.approx(1, abs=0.02), name


@packing_cpu
@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit. an autograd kernel")
def test_gradients_are_wrong_after_a_plain_eval(folder: Path) -> None:
    """Why this module exists; a failure here means bitsandbytes has been mended."""
    base = nf4(folder, torch.float32)
    right = lora_gradients(qlora(dense_twin(folder, base, torch.float32)))
    model = qlora(base)
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS)
    assert least_cosine(lora_gradients(model), right) < 0.9


@packing_cpu
def test_repacked_layers_are_refused(folder: Path) -> None:
    model = nf4(folder, torch.bfloat16)
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS)
    modes = [module.training for module in model.modules()]
    for use in (keep_linear4bit_trainable, qlora):
        with pytest.raises(ModelError, match="layers.0.self_attn.q_proj was repacked"):
            use(model)
    with pytest.raises(ModelError, match="load the model again"):
        with evaluation_mode(model):
            pass
    others = {m for m in model.modules() if not isinstance(m, Linear4bit)}
    assert not any(module.training for module in others)
    assert len(modes) == len(others) + LINEARS


@packing_cpu
def test_shapes_that_cannot_be_repacked_work_in_evaluation_mode(
    tmp_path: Path,
) -> None:
    model = nf4(save_tiny(tmp_path, intermediate_size=100), torch.float32)
    with torch.no_grad(), evaluation_mode(model):
        logits = model(input_ids=IDS).logits
    assert torch.isfinite(logits).all()
    model.eval()
    with pytest.raises(AssertionError, match="divisible"), torch.no_grad():
        model(input_ids=IDS)


def test_loads_in_evaluation_mode_with_trainable_4bit_layers(folder: Path) -> None:
    loaded = load_llama_nf4(str(folder))
    layers = linears(loaded.model)
    assert len(layers) == LINEARS
    assert all(layer.training for layer in layers.values())
    assert sum(module.training for module in loaded.model.modules()) == LINEARS
    layer = layers["model.layers.1.mlp.down_proj"]
    assert layer.weight.quant_type == "nf4"
    assert layer.weight.quant_state.shape == (64, 128)
    assert layer.compute_dtype == torch.bfloat16
    assert layer.weight.numel() == 64 * 128 // 2
    assert loaded.tokenizer("一丁").input_ids == [0, 1]


def test_double_quantisation_is_passed_on(folder: Path) -> None:
    for wanted in (False, True):
        layers = linears(nf4(folder, torch.bfloat16, double_quant=wanted))
        assert {x.weight.quant_state.nested for x in layers.values()} == {wanted}


def test_fingerprint_is_the_dense_model_s(folder: Path) -> None:
    loaded = load_llama_nf4(str(folder))
    assert loaded.fingerprint == load_llama(str(folder)).fingerprint
    with pytest.raises(ModelError, match="uint8.*from the folder"):
        model_fingerprint(loaded.model)


def test_evaluation_mode_restores_what_was(folder: Path) -> None:
    model = qlora(nf4(folder, torch.bfloat16))
    model.train()
    frozen = model.get_submodule("base_model.model.model.norm")
    frozen.eval()
    before = {module: module.training for module in model.modules()}
    with pytest.raises(KeyError), evaluation_mode(model):
        assert sum(module.training for module in model.modules()) == LINEARS
        raise KeyError
    assert {module: module.training for module in model.modules()} == before
    assert not frozen.training

    model.eval()
    with evaluation_mode(model):
        pass
    assert keep_linear4bit_trainable(model) == LINEARS
    assert sum(module.training for module in model.modules()) == LINEARS


def test_qlora_is_drawn_from_its_seed_alone(folder: Path) -> None:
    def matrices(seed: int) -> dict[str, torch.Tensor]:
        adapted = attach_qlora(
            load_llama(str(folder)).model, rank=4, alpha=8, seed=seed
        )
        return {n: p for n, p in adapted.named_parameters() if p.requires_grad}

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        first = matrices(7)
        torch.manual_seed(4)
        state = torch.get_rng_state()
        second, third = matrices(7), matrices(8)
        assert torch.equal(torch.get_rng_state(), state)
    assert len(first) == 12
    for name, matrix in first.items():
        assert torch.equal(matrix, second[name])
        if "lora_B" in name:
            assert not matrix.any()
        else:
            assert not torch.equal(matrix, third[name])


def test_qlora_trains_only_the_adapter_of_the_targets(folder: Path) -> None:
    model = attach_qlora(
        nf4(folder, torch.bfloat16), rank=2, alpha=4, targets=("q_proj",), seed=0
    )
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 4
    assert all("q_proj.lora_" in name for name in trainable)
    assert all(layer.training for layer in linears(model).values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2, "targets": ("up_proj", "w1")}, r"targets \['w1'\]"),
        ({"rank": 2, "targets": ()}, "at least one"),
    ],
)
def test_qlora_refuses_bad_settings(
    settings: dict[str, object], message: str, folder: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        attach_qlora(load_llama(str(folder)).model, alpha=4, seed=0, **settings)
