"""Bootstrap from disk to disk: the in-memory result, resumed after any crash."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from samv2.common.errors import ModelError
from samv2.experts.moe_layers import WalkOptions
from samv2.models import bootstrap as bootstrapping
from samv2.models import conversion as converting
from samv2.models import streamed_bootstrap as streaming
from samv2.models.bootstrap import bootstrap
from samv2.models.conversion import LayerReport
from samv2.models.dense_layers import DenseLayers
from samv2.models.expert_model import ExpertModel
from samv2.models.logit_scale import split_calibration
from samv2.models.perplexity import score_windows
from samv2.models.quantised_blocks import quantise_folder
from samv2.models.save import load_expert_model, save_expert_model
from samv2.models.streamed_bootstrap import StreamedBootstrap, bootstrap_to_folder
from samv2.models.streamed_scores import score_folder
from tests.helpers import VOCAB, assert_close, generator, tiny_config, tiny_settings

KS = ["experts.other_k=2", "experts.allocate=true", "experts.cluster_starts=1"]
LAYERS, REPAIRS = 3, 6
"""Of the tiny model; and how many repairs its three layers get for K = 2 and K = 4."""


class Stopped(Exception):
    """What a test interrupts a bootstrap with."""


@pytest.fixture(scope="module")
def heldout(tiny_tokens: Tensor) -> dict[str, Tensor]:
    """Two domains of unequal size."""
    windows_NS = tiny_tokens[-24 * 64 :].view(24, 64)
    return {"first": windows_NS[:17], "second": windows_NS[17:]}


Run = Callable[..., StreamedBootstrap]


@pytest.fixture(scope="module")
def bootstrap_tiny(
    tiny_llama_folder: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_calibration: Tensor,
    heldout: dict[str, Tensor],
) -> Run:
    """A bootstrap of the tiny model for K = 2, 4 and 8."""

    def made(
        *overrides: str,
        dense: Path = tiny_llama_folder,
        dtype: torch.dtype = torch.float32,
        calibration_BS: Tensor = tiny_calibration,
        heldout: dict[str, Tensor] = heldout,
        **options: Any,
    ) -> StreamedBootstrap:
        return bootstrap_to_folder(
            DenseLayers.open(dense, dtype=dtype),
            tiny_tokenizer,
            calibration_BS,
            heldout,
            tiny_settings(*KS, *overrides),
            **({"fingerprint": "abc"} | options),
        )

    return made


@pytest.fixture
def run(bootstrap_tiny: Run, tmp_path: Path) -> Run:
    """To ``tmp_path / "made"`` unless another folder is given."""
    return partial(bootstrap_tiny, folder=tmp_path / "made")


@pytest.fixture(scope="module")
def reference(
    bootstrap_tiny: Run, tmp_path_factory: pytest.TempPathFactory
) -> tuple[StreamedBootstrap, dict[str, Tensor]]:
    """What an uninterrupted bootstrap makes."""
    folder = tmp_path_factory.mktemp("reference") / "made"
    return bootstrap_tiny(folder=folder), tensors_of(folder)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        assert not found.keys() & tensors.keys(), "nothing is stored twice"
        found |= tensors
    return found


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def timeless(reports: tuple[LayerReport, ...]) -> list[LayerReport]:
    return [replace(report, seconds=0.0) for report in reports]


def assert_same_result(found: StreamedBootstrap, expected: StreamedBootstrap) -> None:
    assert found.config == expected.config
    assert timeless(found.layers) == timeless(expected.layers)
    assert found.scores == expected.scores
    assert found.dense_scores == expected.dense_scores
    stats = (
        [replace(one, seconds=0.0) for one in made.cluster_stats]
        for made in (found, expected)
    )
    assert next(stats) == next(stats)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["experts.layers=0,2", "assembler.width=0"],
        ["experts.repair=false", "experts.other_k="],
        ["experts.repair_rank=0", "experts.surrogate_rank=0", "experts.chains=true"],
        ["experts.experts_per_token=8", "experts.other_k="],
        ["experts.combine=softmax"],
    ],
)
def test_the_result_is_that_of_the_bootstrap_in_memory(
    run: Run,
    overrides: list[str],
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_calibration: Tensor,
    tmp_path: Path,
) -> None:
    """Held-out windows ride along in chunks of their own and change no bit.

    Logit scales are fitted to the states of other batches, and end in other digits.
    """
    streamed = run(*overrides)
    for parameter in tiny_llama.parameters():
        # Products also depend on how a tensor is aligned in memory.
        parameter.data = parameter.data.clone()
    settings = tiny_settings(*KS, *overrides)
    whole = bootstrap(tiny_llama, tiny_calibration, settings, fingerprint="abc")
    save_expert_model(whole.model, tiny_tokenizer, tmp_path / "whole")
    config = whole.model.expert_config
    assert streamed.config.logit_scales == pytest.approx(config.logit_scales, rel=1e-4)
    assert replace(streamed.config, logit_scales=()) == replace(config, logit_scales=())
    assert timeless(streamed.layers) == timeless(whole.layers)
    assert_same_bits(tensors_of(tmp_path / "made"), tensors_of(tmp_path / "whole"))
    files = [
        {path.name for path in (tmp_path / name).iterdir()}
        for name in ("made", "whole")
    ]
    assert files[0] - files[1] == {
        "other.safetensors",
        *(f"layer-{index:05d}.safetensors" for index in range(LAYERS)),
    }
    assert files[1] - files[0] == {"model.safetensors"}
    loaded = [load_expert_model(tmp_path / name) for name in ("made", "whole")]
    assert_same_bits(*(model.state_dict() for model, _ in loaded))
    assert loaded[0][1]("def f").input_ids == tiny_tokenizer("def f").input_ids


def test_scores_are_those_of_the_loaded_model(
    run: Run,
    heldout: dict[str, Tensor],
    tiny_llama: LlamaForCausalLM,
    tmp_path: Path,
) -> None:
    """Of all K and of the dense model, up to the order of sums."""
    streamed = run()
    model = ExpertModel.from_pretrained(tmp_path / "made")
    assert sorted(streamed.scores) == [2, 4, 8]
    for k, scores in streamed.scores.items():
        assert list(scores) == ["first", "second"]
        for name, windows_NS in heldout.items():
            options = WalkOptions(experts_per_token=k)
            expected = score_windows(model, windows_NS, walk_options=options)
            assert scores[name].tokens == expected.tokens == len(windows_NS) * 63
            assert scores[name].nll == pytest.approx(expected.nll, rel=1e-5)
    for name, windows_NS in heldout.items():
        expected = score_windows(tiny_llama, windows_NS)
        dense = streamed.dense_scores[name]
        assert dense.tokens == expected.tokens
        assert dense.nll == pytest.approx(expected.nll, rel=1e-5)
        assert streamed.scores[8][name].nll == pytest.approx(dense.nll, rel=1e-5)
        # And fewer visits are worse.
        losses = [streamed.scores[k][name].nll for k in (8, 4, 2)]
        assert losses == sorted(losses) and losses[2] > losses[0] + 1


def test_layers_behind_the_last_converted_one_are_passed(
    run: Run, heldout: dict[str, Tensor], tmp_path: Path, tiny_llama: LlamaForCausalLM
) -> None:
    streamed = run("experts.layers=1")
    model = ExpertModel.from_pretrained(tmp_path / "made")
    for k in (2, 4, 8):
        expected = score_windows(
            model, heldout["first"], walk_options=WalkOptions(experts_per_token=k)
        )
        assert streamed.scores[k]["first"].nll == pytest.approx(expected.nll, rel=1e-5)
    assert [report.layer for report in streamed.layers] == [1]
    dense, made = tiny_llama.state_dict(), model.llama.state_dict()
    for index in (0, 2):
        for name, value in dense.items():
            if name.startswith(f"model.layers.{index}."):
                assert torch.equal(made[name], value), name


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often layers are surveyed, repaired and read."""
    counts = {"survey_layer": 0, "fit_repair": 0}

    def spied(name: str) -> Callable[..., Any]:
        original = getattr(module_of(name), name)

        def spy(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return original(*args, **kwargs)

        return spy

    for name in counts:
        monkeypatch.setattr(module_of(name), name, spied(name))
    return counts


def module_of(name: str) -> ModuleType:
    """The first of a bootstrap's modules that calls a function of this name."""
    modules = (streaming, converting, bootstrapping)
    return next(module for module in modules if hasattr(module, name))


def stop_at(name: str, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise on the call-th call of a function that a bootstrap makes."""
    module = module_of(name)
    original, seen = getattr(module, name), iter(range(1000))

    def stopping(*args: Any, **kwargs: Any) -> Any:
        if next(seen) == call:
            raise Stopped(f"{name} {call}")
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, stopping)


def interrupt(
    run: Run, name: str, call: int, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> None:
    with monkeypatch.context() as patch:
        stop_at(name, call, patch)
        with pytest.raises(Stopped):
            run(**options)


@pytest.fixture
def store_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "STORE_SECONDS", 0.0)


@pytest.mark.parametrize("call", range(REPAIRS))
def test_a_bootstrap_goes_on_at_the_layer_that_it_was_stopped_in(
    run: Run,
    reference: tuple[StreamedBootstrap, dict[str, Tensor]],
    calls: dict[str, int],
    store_always: None,
    call: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever repair it was at; what was stored before is not done again."""
    interrupt(run, "fit_repair", call, monkeypatch)
    assert not (tmp_path / "made").exists() and (tmp_path / ".made.partial").is_dir()
    calls |= dict.fromkeys(calls, 0)
    phases: list[tuple[str, int, int]] = []
    found = run(progress=lambda *phase: phases.append(phase))
    layer = call // 2
    assert found.resumed_at == layer
    assert calls == {"survey_layer": 0, "fit_repair": REPAIRS - 2 * layer}
    expected = [("Converting layers", done, 3) for done in range(layer, 4)]
    assert phases == expected
    assert_same_result(found, reference[0])
    assert_same_bits(tensors_of(tmp_path / "made"), reference[1])
    assert {path.name for path in tmp_path.iterdir()} == {"made"}


def test_a_bootstrap_may_be_stopped_again_and_again(
    run: Run,
    reference: tuple[StreamedBootstrap, dict[str, Tensor]],
    store_always: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, call in (
        ("survey_layer", 0),
        ("survey_layer", 2),
        ("with_visits", 0),
        ("fit_repair", 3),
        ("fit_repair", 1),
        ("fit_repair", 2),
        ("score_streams", 0),
        ("write_config", 0),
    ):
        interrupt(run, name, call, monkeypatch)
        assert not (tmp_path / "made").exists(), name
    found = run()
    assert found.resumed_at == 2, "streams are not stored behind the last layer"
    assert_same_result(found, reference[0])
    assert_same_bits(tensors_of(tmp_path / "made"), reference[1])


@pytest.mark.parametrize(
    "overrides",
    [["experts.repair=false", "experts.other_k="], ["experts.layers=0,2"]],
)
def test_other_kinds_of_bootstraps_resume_to_the_same_bits(
    run: Run,
    store_always: None,
    overrides: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Surrogates serve where there are no repairs; a dense layer is stored as well."""
    expected = run(*overrides, folder=tmp_path / "reference")
    original = streaming._Work.store

    def stop_after_storing(self: Any, conversion: Any, reports: Any) -> None:
        original(self, conversion, reports)
        if conversion.next_layer == 2:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(streaming._Work, "store", stop_after_storing)
        with pytest.raises(Stopped):
            run(*overrides)
    found = run(*overrides)
    assert found.resumed_at == 2
    assert_same_result(found, expected)
    assert_same_bits(tensors_of(tmp_path / "made"), tensors_of(tmp_path / "reference"))


def test_streams_are_stored_only_now_and_then(
    run: Run,
    reference: tuple[StreamedBootstrap, dict[str, Tensor]],
    calls: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A quick bootstrap repeats its layers, but not its survey."""
    interrupt(run, "fit_repair", 5, monkeypatch)
    work = tmp_path / ".made.partial"
    assert not list(work.glob("state*")) and list(work.glob("layer-*"))
    calls |= dict.fromkeys(calls, 0)
    found = run()
    assert found.resumed_at == 0
    assert calls == {"survey_layer": 0, "fit_repair": REPAIRS}
    assert_same_bits(tensors_of(tmp_path / "made"), reference[1])


def test_one_set_of_streams_is_kept(
    run: Run, store_always: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(run, "fit_repair", 5, monkeypatch)
    work = tmp_path / ".made.partial"
    assert {path.name for path in work.iterdir()} == {
        "job.json",
        "survey.json",
        "survey.safetensors",
        "layer-00000.safetensors",
        "layer-00001.safetensors",
        "state-2.safetensors",
        "state.json",
    }
    streams = load_file(work / "state-2.safetensors")
    assert {name: len(value) for name, value in streams.items()} == {
        "dense": 15 + 1 + 24,
        "2": 15 + 1 + 24,
        "4": 15 + 1 + 24,
        "8": 1 + 24,
    }


def test_what_finishes_a_bootstrap_sees_the_folder_before_it_has_its_name(
    run: Run,
    reference: tuple[StreamedBootstrap, dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    def finish(folder: Path, made: StreamedBootstrap) -> StreamedBootstrap:
        assert torch.is_grad_enabled(), "it may train"
        assert not (tmp_path / "made").exists()
        assert_same_bits(tensors_of(folder), reference[1])
        (folder / "note.txt").write_text("finished")
        return replace(made, resumed_at=77)

    assert run(finish=finish).resumed_at == 77
    assert (tmp_path / "made" / "note.txt").read_text() == "finished"
    assert {path.name for path in tmp_path.iterdir()} == {"made"}


@pytest.mark.parametrize("stop", ["quantise", "score"])
def test_a_bootstrap_that_is_stopped_while_it_quantises_goes_on(
    run: Run,
    calls: dict[str, int],
    store_always: None,
    heldout: dict[str, Tensor],
    tiny_llama_folder: Path,
    tmp_path: Path,
    stop: str,
) -> None:
    """To the bits of one that was not, with the layers before the last not repeated."""
    source = DenseLayers.open(tiny_llama_folder, dtype=torch.float32)

    def finish(stops_at: str, folder: Path, made: StreamedBootstrap):
        def stopping(done: int, total: int) -> None:
            if stops_at == "quantise" and done == 2:
                raise Stopped

        quantise_folder(folder, progress=stopping)
        if stops_at == "score":
            raise Stopped
        scores = score_folder(folder, source, heldout, sorted(made.scores))
        return replace(made, scores=scores)

    expected = run(finish=partial(finish, ""), folder=tmp_path / "reference")
    with pytest.raises(Stopped):
        run("experts.quantise=none", finish=partial(finish, stop))
    assert not (tmp_path / "made").exists()
    calls |= dict.fromkeys(calls, 0)
    found = run("experts.quantise=nf4", finish=partial(finish, ""))
    assert calls == {"survey_layer": 0, "fit_repair": 2}
    assert found.scores == expected.scores
    made = tensors_of(tmp_path / "made")
    assert_same_bits(made, tensors_of(tmp_path / "reference"))
    assert "model.layers.0.mlp.repair_2_down_codes_EH" in made
    assert {path.name for path in tmp_path.iterdir()} == {"made", "reference"}


@pytest.fixture(scope="module")
def stopped_work(bootstrap_tiny: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work of a bootstrap that was stopped at layer 1, its streams stored."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "STORE_SECONDS", 0.0)
        stop_at("fit_repair", 3, patch)
        with pytest.raises(Stopped):
            bootstrap_tiny(folder=folder / "made")
    return folder / ".made.partial"


@pytest.fixture
def work(stopped_work: Path, tmp_path: Path) -> Path:
    """A copy of it, for ``run`` to find."""
    return Path(shutil.copytree(stopped_work, tmp_path / ".made.partial"))


def changed_seed(run: Run, **options: Any) -> StreamedBootstrap:
    return run("seed=1", **options)


def changed_rank(run: Run, **options: Any) -> StreamedBootstrap:
    return run("experts.repair_rank=3", **options)


def changed_starts(run: Run, **options: Any) -> StreamedBootstrap:
    return run("experts.cluster_starts=2", **options)


def changed_k(run: Run, **options: Any) -> StreamedBootstrap:
    return run("experts.other_k=3", **options)


def changed_model(run: Run, **options: Any) -> StreamedBootstrap:
    return run(**({"fingerprint": "xyz"} | options))


def changed_dtype(run: Run, **options: Any) -> StreamedBootstrap:
    return run(dtype=torch.bfloat16, **options)


def changed_text(run: Run, **options: Any) -> StreamedBootstrap:
    text = torch.randint(VOCAB, (16, 64), generator=generator(4))
    return run(calibration_BS=text, **options)


def changed_heldout(run: Run, **options: Any) -> StreamedBootstrap:
    text = torch.randint(VOCAB, (24, 64), generator=generator(4))
    return run(heldout={"first": text[:17], "second": text[17:]}, **options)


@pytest.mark.parametrize(
    "changed",
    [
        changed_seed,
        changed_rank,
        changed_starts,
        changed_k,
        changed_model,
        changed_dtype,
        changed_text,
        changed_heldout,
    ],
)
def test_work_on_something_else_is_dropped(
    run: Run, work: Path, changed: Callable[..., StreamedBootstrap]
) -> None:
    (work / "layer-00009.safetensors").write_bytes(b"stale")

    def stop(phase: str, done: int, total: int) -> None:
        raise Stopped(phase)

    with pytest.raises(Stopped, match="Surveying layers"):
        changed(run, progress=stop)
    assert [path.name for path in work.iterdir()] == ["job.json"]


def test_the_same_work_is_not_dropped(run: Run, work: Path) -> None:
    """Or the test above would hold of one that always begins again."""
    kept = {path.name for path in work.iterdir()}

    def stop(phase: str, done: int, total: int) -> None:
        raise Stopped(f"{phase} {done}")

    with pytest.raises(Stopped, match="Converting layers 1"):
        run(progress=stop)
    assert {path.name for path in work.iterdir()} == kept


def test_dropped_work_leaves_no_trace(
    run: Run,
    work: Path,
    tmp_path: Path,
    bootstrap_tiny: Run,
) -> None:
    expected = changed_seed(bootstrap_tiny, folder=tmp_path / "reference")
    found = changed_seed(run)
    assert found.resumed_at == 0
    assert_same_result(found, expected)
    assert_same_bits(tensors_of(tmp_path / "made"), tensors_of(tmp_path / "reference"))


def test_nothing_appears_at_the_output_before_the_end(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = tmp_path / "made", []
    run(progress=lambda phase, done, total: seen.append((phase, done, folder.exists())))
    assert seen == [
        *(("Surveying layers", done, False) for done in (1, 2, 3)),
        *(("Converting layers", done, False) for done in (0, 1, 2, 3)),
    ]
    before = tensors_of(folder)
    # A second bootstrap leaves the first one whole until it is done.
    interrupt(run, "write_config", 0, monkeypatch, fingerprint="xyz")
    assert_same_bits(tensors_of(folder), before)
    assert ExpertModel.from_pretrained(folder).expert_config.base_fingerprint == "abc"
    assert {path.name for path in tmp_path.iterdir()} == {"made", ".made.partial"}
    run(fingerprint="xyz")
    assert ExpertModel.from_pretrained(folder).expert_config.base_fingerprint == "xyz"
    assert {path.name for path in tmp_path.iterdir()} == {"made"}


def test_what_a_crash_left_behind_is_harmless(
    run: Run,
    work: Path,
    reference: tuple[StreamedBootstrap, dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    leftovers = [
        "layer-00001.new",
        "layer-00002.new",
        "state-2.new",
        "other.new",
        ".state.json-x1y2",
    ]
    for name in leftovers:
        (work / name).write_bytes(b"half a file")
    # Streams whose numbers were not written yet.
    (work / "state-2.safetensors").write_bytes(b"half a file")
    found = run()
    assert found.resumed_at == 1
    assert_same_result(found, reference[0])
    assert_same_bits(tensors_of(tmp_path / "made"), reference[1])
    assert not any(path.name in leftovers for path in (tmp_path / "made").iterdir())
    assert not work.exists()


@pytest.mark.parametrize("name", ["job", "survey", "state"])
@pytest.mark.parametrize("text", ["", '{"key": ', "\x00\x00"])
def test_a_damaged_file_of_an_unfinished_bootstrap_is_named(
    run: Run, work: Path, name: str, text: str
) -> None:
    (work / f"{name}.json").write_text(text)
    message = rf"\.made\.partial/{name}\.json is damaged .* remove .*\.made\.partial to"
    with pytest.raises(ModelError, match=message):
        run()


@pytest.mark.parametrize("name", ["survey.safetensors", "state-1.safetensors"])
def test_damaged_tensors_of_an_unfinished_bootstrap_are_named(
    run: Run, work: Path, name: str
) -> None:
    path = work / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(
        ModelError, match=rf"{name} is damaged .* remove .*\.partial to"
    ):
        run()
    path.unlink()
    with pytest.raises(ModelError, match=rf"{name} is damaged"):
        run()


SIZES = {
    key: value
    for key, value in tiny_config(tie_word_embeddings=False).to_dict().items()
    if key not in ("model_type", "architectures", "dtype", "transformers_version")
}
WINDOW = 16
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(**(SIZES | {"sliding_window": WINDOW}))
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "windowed qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(
            **SIZES,
            sliding_window=WINDOW,
            use_sliding_window=True,
            max_window_layers=1,
        )
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_other_architectures_are_calibrated_on_what_they_see(
    run: Run,
    kind: str,
    heldout: dict[str, Tensor],
    tiny_calibration: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Windows of attention are shorter than the text; the head is not tied."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MODELS[kind]().save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    inputs: list[Tensor] = []
    for layer in dense.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        dense(split_calibration(tiny_calibration)[0])
    expected, seen = list(inputs), []
    survey_layer = bootstrapping.survey_layer

    def spy(position: int, mlp: torch.nn.Module, x_ND: Tensor, *rest: Any) -> Any:
        seen.append(x_ND)
        return survey_layer(position, mlp, x_ND, *rest)

    monkeypatch.setattr(bootstrapping, "survey_layer", spy)
    streamed = run(dense=tmp_path / "dense")
    assert len(seen) == LAYERS
    for index, x_ND in enumerate(seen):
        assert_close(f"layer {index}", x_ND, expected[index].flatten(0, 1), "logits")
    model = ExpertModel.from_pretrained(tmp_path / "made")
    for name, windows_NS in heldout.items():
        whole = score_windows(dense, windows_NS)
        assert streamed.dense_scores[name].nll == pytest.approx(whole.nll, rel=1e-5)
        assert streamed.scores[8][name].nll == pytest.approx(whole.nll, rel=1e-5)
        for k in (2, 4):
            options = WalkOptions(experts_per_token=k)
            found = score_windows(model, windows_NS, walk_options=options)
            assert streamed.scores[k][name].nll == pytest.approx(found.nll, rel=1e-5)


def test_one_expert_can_be_made(run: Run) -> None:
    """Its clustering has nothing to be compared with."""
    streamed = run(
        "experts.num_experts=1",
        "experts.experts_per_token=1",
        "experts.num_shared=0",
        "experts.other_k=",
    )
    assert list(streamed.scores) == [1] and streamed.config.repaired == ()
    for name, score in streamed.dense_scores.items():
        assert streamed.scores[1][name].nll == pytest.approx(score.nll, rel=1e-5)


def test_a_domain_may_have_no_windows(run: Run, heldout: dict[str, Tensor]) -> None:
    streamed = run(heldout=heldout | {"none": heldout["first"][:0]})
    for scores in (streamed.dense_scores, *streamed.scores.values()):
        assert scores["none"].tokens == 0 and scores["second"].tokens == 7 * 63


@pytest.mark.parametrize(
    "cut, message",
    [
        (lambda held: {}, "no held-out text; give at least one window"),
        (lambda held: {"a": held["first"][:0]}, "no held-out text"),
        (
            lambda held: {"a": held["first"][:, :32]},
            "windows of a have 32 tokens, those of calibration text have 64",
        ),
    ],
)
def test_windows_that_cannot_ride_along_are_refused_first(
    run: Run,
    heldout: dict[str, Tensor],
    cut: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    message: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(ModelError, match=message):
        run(heldout=cut(heldout))
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_converted_is_refused_first(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="experts.layers names '7'"):
        run("experts.layers=7")
    assert not list(tmp_path.iterdir())
