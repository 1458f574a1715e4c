"""Fixtures of the federation: a private cache, and a bootstrapped tiny model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from samv2.models.save import save_expert_model
from tests.federated.runs import SMALL
from tests.helpers import convert


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Divided text goes to a cache of the tests' own, also in subprocesses."""
    before = os.environ.get("SAMV2_CACHE")
    os.environ["SAMV2_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["SAMV2_CACHE"]
    else:
        os.environ["SAMV2_CACHE"] = before


@pytest.fixture(scope="session")
def expert_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama_folder: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_calibration: Tensor,
) -> Path:
    """The tiny model as a bootstrapped folder that fits :data:`SMALL`."""
    folder = tmp_path_factory.mktemp("expert") / "tiny-experts"
    llama = LlamaForCausalLM.from_pretrained(tiny_llama_folder).eval()
    made = convert(llama, tiny_calibration, SMALL)
    save_expert_model(made.model, tiny_tokenizer, folder)
    return folder
