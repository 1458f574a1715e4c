"""Fixtures that all tests share."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # Before anything imports triton: kernels are run.

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from samv2.models.expert_model import ExpertModel
from tests.helpers import convert, stdlib_text, train_llama, train_tokenizer

hypothesis.settings.register_profile(
    "tests", deadline=None, derandomize=True, max_examples=50
)
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """One torch thread: the same bits on every machine with the same instructions."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Fill ``torch.empty`` with NaN, and refuse ops that are not deterministic."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 tokens, trained on the standard library."""
    return train_tokenizer(stdlib_text())


@pytest.fixture(scope="session")
def tiny_tokens(tiny_tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """The standard library's text as (N,) int64 tokens; the model saw all but 10,000."""
    return torch.tensor(tiny_tokenizer.backend_tokenizer.encode(stdlib_text()).ids)


@pytest.fixture(scope="session")
def tiny_batch(tiny_tokens: Tensor) -> Tensor:
    """(4, 40) held-out tokens."""
    return tiny_tokens[-4 * 40 :].view(4, 40)


@pytest.fixture(scope="session")
def tiny_llama_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_tokens: Tensor,
) -> Path:
    """A folder with a trained tiny Llama and its tokenizer, as ``from_pretrained`` reads."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    train_llama(tiny_tokens[:-10_000]).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_llama(tiny_llama_folder: Path) -> LlamaForCausalLM:
    """The trained tiny Llama, loaded anew."""
    return LlamaForCausalLM.from_pretrained(tiny_llama_folder).eval()


@pytest.fixture(scope="session")
def tiny_calibration(tiny_tokens: Tensor) -> Tensor:
    """(16, 64) tokens of calibration text."""
    return tiny_tokens[: 16 * 64].view(16, 64)


@pytest.fixture
def tiny_expert_model(
    tiny_llama: LlamaForCausalLM, tiny_calibration: Tensor
) -> ExpertModel:
    """The tiny Llama as an expert graph: E = 8, K = 4, 1 shared, all 3 layers."""
    return convert(tiny_llama, tiny_calibration).model
