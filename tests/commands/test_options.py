"""A bootstrapped folder brings its conversion settings along."""

import argparse
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from samv2.commands.options import settings_from
from samv2.models.save import save_expert_model
from tests.helpers import VOCAB, convert, generator


def parsed(*overrides: str) -> argparse.Namespace:
    return argparse.Namespace(config=None, overrides=list(overrides))


@pytest.fixture
def graph_folder(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> Path:
    calibration = torch.randint(VOCAB, (4, 32), generator=generator(0))
    model = convert(tiny_llama, calibration, ["experts.layers=1-2"]).model
    save_expert_model(model, tiny_tokenizer, tmp_path / "graph")
    return tmp_path / "graph"


def test_conversion_settings_come_from_the_folder(
    graph_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(graph_folder.parent)
    settings = settings_from(parsed("model.path=graph", "federation.rounds=2"))
    assert settings.model.path == str(graph_folder.resolve())
    assert settings.experts.num_experts == 8
    assert settings.experts.layers == "1,2"
    assert settings.adapter.rank == 4
    assert settings.federation.rounds == 2


def test_what_is_given_wins_over_the_folder(graph_folder: Path) -> None:
    settings = settings_from(
        parsed(f"model.path={graph_folder}", "experts.experts_per_token=6")
    )
    assert settings.experts.experts_per_token == 6
    assert settings.experts.num_experts == 8


def test_a_name_stays_a_name() -> None:
    assert settings_from(parsed()).model.path == "smollm2"
    assert settings_from(parsed("model.path=org/name")).model.path == "org/name"
