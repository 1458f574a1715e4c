"""Bootstrap from disk to disk, one decoder layer in memory at a time, resumable.

The work is kept in ``.NAME.partial`` beside the output folder: what the survey found,
every converted layer, and now and then the streams. A bootstrap that was killed goes on
from the last streams it stored, if model, settings and text are the same; the output
folder appears whole at the end.

Shapes: B sequences, S positions, D model width, E experts.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from samv2.common.errors import ModelError
from samv2.common.files import replace_folder, write_json
from samv2.common.settings import Settings
from samv2.experts.allocation import Curve
from samv2.experts.calibration import Gate
from samv2.experts.emoe_cluster import ClusterStats
from samv2.experts.sibling_gate import SiblingGate
from samv2.models.bootstrap import (
    check_convertible,
    initial_config,
    make_assembler,
    survey,
    with_visits,
)
from samv2.models.conversion import Conversion, LayerReport
from samv2.models.convert_layer import Surveyed
from samv2.models.dense_layers import DenseLayers
from samv2.models.expert_config import ExpertModelConfig
from samv2.models.logit_scale import fit_logit_scale, split_calibration
from samv2.models.perplexity import Score
from samv2.models.save import other_tensors, stored_tensors, write_config
from samv2.models.stored_layers import OTHER, layer_file, write_tensors
from samv2.models.streamed_scores import score_streams
from samv2.models.text_stream import TextStream
from samv2_kernels import Surrogates

STORE_SECONDS = 60.0
"""Streams are stored when so much work would be lost without."""
SURVEY, STATE = "survey", "state"
DENSE = 0
"""Stands for the dense stream among the values of K."""


@dataclass(frozen=True, kw_only=True)
class StreamedBootstrap:
    """What a bootstrap from disk to disk made and measured."""

    config: ExpertModelConfig
    cluster_stats: tuple[ClusterStats, ...]
    layers: tuple[LayerReport, ...]
    scores: dict[int, dict[str, Score]]
    """By K, by domain: of the held-out windows; K = E visits every expert."""
    dense_scores: dict[str, Score]
    resumed_at: int
    """The first layer that was converted by this call."""
    unquantised_scores: dict[int, dict[str, Score]] | None = None
    """As ``scores``, before expert blocks were quantised; None where they were not."""


Finish = Callable[[Path, StreamedBootstrap], StreamedBootstrap]
"""Changes a folder and what is known of it, before the folder takes its name."""


def bootstrap_to_folder(
    source: DenseLayers,
    tokenizer: PreTrainedTokenizerBase,
    calibration_BS: Tensor,
    heldout: Mapping[str, Tensor],
    settings: Settings,
    folder: Path,
    *,
    fingerprint: str,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
    finish: Finish = lambda folder, made: made,
) -> StreamedBootstrap:
    """Convert a dense checkpoint on disk, and score every K on held-out text.

    Args:
        source: the dense checkpoint.
        tokenizer: saved with the result.
        calibration_BS: (B, S) int64 token ids of calibration text.
        heldout: by domain, (N, S) int64 windows of the same length S.
        settings: sections ``experts``, ``adapter``, ``assembler`` and the seed are used.
        folder: to be written or replaced.
        fingerprint: of the dense model.
        progress: called with a phase, layers done and layers in all.
        finish: what else is to be done to the converted folder. A bootstrap that is
            killed in it goes on with the last layers, and with it from its beginning.

    Raises:
        ModelError: see :func:`samv2.models.bootstrap.check_convertible`; or there are no
            held-out windows, or some of another length.
    """
    layers = check_convertible(source.config, settings)
    _check_windows(calibration_BS, heldout)
    config = initial_config(layers, settings, fingerprint)
    work = _Work(folder, _key(config, settings, calibration_BS, heldout, source))
    made = _convert(source, calibration_BS, heldout, config, settings, work, progress)
    with work.published(source, made.config, tokenizer) as converted:
        return finish(converted, made)


@torch.no_grad()
def _convert(
    source: DenseLayers,
    calibration_BS: Tensor,
    heldout: Mapping[str, Tensor],
    config: ExpertModelConfig,
    settings: Settings,
    work: _Work,
    progress: Callable[[str, int, int], None],
) -> StreamedBootstrap:
    """Survey, convert and score what is not done yet; leaves all tensors in ``work``."""
    fitted_BS, reserved_BS = split_calibration(calibration_BS)
    surveyed = work.read_survey()
    if surveyed is None:
        surveys = config.layers[-1] + 1
        counter = _counter(lambda done: progress("Surveying layers", done, surveys))
        surveyed = survey(source, fitted_BS, config, settings, counter)
        work.write_survey(surveyed)
    config = with_visits(config, surveyed, source.config, settings)
    conversion = Conversion(
        source, fitted_BS, config, torch.cat([reserved_BS, *heldout.values()])
    )
    reports = work.restore(conversion)
    resumed_at, stored = conversion.next_layer, time.monotonic()
    total = source.config.num_hidden_layers
    progress("Converting layers", resumed_at, total)
    for index, layer, report in conversion.run(surveyed, whole=True):
        tensors = stored_tensors(layer, f"model.layers.{index}.")
        work.write_tensors(layer_file(index), tensors)
        reports += [] if report is None else [report]
        if time.monotonic() - stored > STORE_SECONDS and index + 1 < total:
            work.store(conversion, reports)
            stored = time.monotonic()
        del layer, tensors
        progress("Converting layers", index + 1, total)
    scales = _logit_scales(conversion, len(reserved_BS))
    config = replace(config, logit_scales=scales)
    scores, dense_scores = _score(conversion, heldout, config)
    others = {name: source.tensor(name) for name in source.other_names()}
    assembler = make_assembler(source.config.hidden_size, config)
    gate = SiblingGate(config.siblings) if config.siblings > 1 else None
    work.write_tensors(OTHER, others | other_tensors(assembler, gate))
    return StreamedBootstrap(
        config=config,
        cluster_stats=tuple(one.stats for one in surveyed),
        layers=tuple(reports),
        scores=scores,
        dense_scores=dense_scores,
        resumed_at=resumed_at,
    )


def _check_windows(calibration_BS: Tensor, heldout: Mapping[str, Tensor]) -> None:
    length = calibration_BS.shape[1]
    for name, tokens_NS in heldout.items():
        if tokens_NS.shape[1] != length:
            raise ModelError(
                f"held-out windows of {name} have {tokens_NS.shape[1]} tokens, those of "
                f"calibration text have {length}; cut both alike"
            )
    if not sum(map(len, heldout.values())):
        raise ModelError("there is no held-out text; give at least one window of it")


def _counter(report: Callable[[int], None]) -> Callable[[], None]:
    done = iter(range(1, 1_000_000))
    return lambda: report(next(done))


def _logit_scales(conversion: Conversion, reserved: int) -> tuple[float, ...]:
    """The factor of every repaired K, on the text behind the fitted sequences."""
    source = conversion.source
    norm, head_VD = source.final_norm(), source.head_weight()

    def last_states(stream: TextStream, first: int) -> Tensor:
        return norm(stream.hidden_BSD[first : first + reserved])

    wanted_BSD = last_states(conversion.dense, conversion.fitted)
    return tuple(
        fit_logit_scale(
            last_states(conversion.streams[k], conversion.fitted), wanted_BSD, head_VD
        )
        for k in conversion.config.repaired
    )


def _score(
    conversion: Conversion, heldout: Mapping[str, Tensor], config: ExpertModelConfig
) -> tuple[dict[int, dict[str, Score]], dict[str, Score]]:
    """Next-token scores of every stream's held-out part."""
    count = sum(map(len, heldout.values()))

    def heldout_part(stream: TextStream) -> Tensor:
        return stream.hidden_BSD[len(stream.hidden_BSD) - count :]

    hidden = {k: heldout_part(one) for k, one in sorted(conversion.streams.items())}
    hidden[DENSE] = heldout_part(conversion.dense)
    scores = score_streams(conversion.source, hidden, heldout, config.logit_scale)
    return scores, scores.pop(DENSE)


def _key(
    config: ExpertModelConfig,
    settings: Settings,
    calibration_BS: Tensor,
    heldout: Mapping[str, Tensor],
    source: DenseLayers,
) -> str:
    """What must be the same for work to be taken up again."""
    # Blocks are quantised after all that is stored here.
    experts = replace(settings.experts, quantise="none")
    facts = [config.to_json(), asdict(experts), str(source.dtype)]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tokens_NS in (("", calibration_BS), *heldout.items()):
        digest.update(f"{name} {tuple(tokens_NS.shape)}".encode())
        digest.update(tokens_NS.contiguous().numpy().tobytes())
    return digest.hexdigest()


class _Work:
    """The folder of an unfinished bootstrap.

    Args:
        folder: what it will become.
        key: of the job; other work that is found there is dropped.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.target = Path(folder)
        self.folder = self.target.parent / f".{self.target.name}.partial"
        known = self._json("job")
        if known is None or known.get("key") != key:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "job.json", {"key": key})

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Replace one of the work's files."""
        write_tensors(self.folder / name, tensors)

    def write_survey(self, surveyed: Sequence[Surveyed]) -> None:
        """Keep the survey: its tensors, then its numbers, which make it count."""
        tensors: dict[str, Tensor] = {}
        rows = []
        for place, one in enumerate(surveyed):
            parts = {
                "order_M": one.order_M,
                "gate_weight_ED": one.gate.weight_ED,
                "gate_bias_E": one.gate.bias_E,
                "edge_mask_EE": one.edge_mask_EE,
            }
            if one.surrogates is not None:
                parts |= {
                    name: getattr(one.surrogates, name)
                    for name in ("shared_QD", "out_EQD", "bias_ED")
                }
            tensors |= {f"{place}.{name}": tensor for name, tensor in parts.items()}
            rows.append({"curve": asdict(one.curve), "stats": asdict(one.stats)})
        self.write_tensors(f"{SURVEY}.safetensors", tensors)
        write_json(self.folder / f"{SURVEY}.json", rows)

    def read_survey(self) -> list[Surveyed] | None:
        """What :meth:`write_survey` kept, or None."""
        rows = self._json(SURVEY)
        if rows is None:
            return None
        tensors = self._tensors(f"{SURVEY}.safetensors")

        def one(place: int, row: dict[str, Any]) -> Surveyed:
            surrogates = None
            if f"{place}.out_EQD" in tensors:
                surrogates = Surrogates(
                    shared_QD=tensors[f"{place}.shared_QD"],
                    out_EQD=tensors[f"{place}.out_EQD"],
                    bias_ED=tensors[f"{place}.bias_ED"],
                )
            curve = {key: tuple(value) for key, value in row["curve"].items()}
            stats = row["stats"] | {"sizes": tuple(row["stats"]["sizes"])}
            return Surveyed(
                order_M=tensors[f"{place}.order_M"],
                gate=Gate(
                    weight_ED=tensors[f"{place}.gate_weight_ED"],
                    bias_E=tensors[f"{place}.gate_bias_E"],
                ),
                surrogates=surrogates,
                edge_mask_EE=tensors[f"{place}.edge_mask_EE"],
                curve=Curve(**curve),
                stats=ClusterStats(**stats),
            )

        return [one(place, row) for place, row in enumerate(rows)]

    def store(self, conversion: Conversion, reports: Sequence[LayerReport]) -> None:
        """Keep the streams and what belongs to them."""
        number = conversion.next_layer
        streams = {"dense": conversion.dense} | {
            str(k): stream for k, stream in conversion.streams.items()
        }
        name = f"{STATE}-{number}.safetensors"
        self.write_tensors(
            name, {key: stream.hidden_BSD for key, stream in streams.items()}
        )
        state = {
            "streams": name,
            "next_layer": number,
            "ridges": {str(k): pair for k, pair in conversion.ridges.items()},
            "reports": [asdict(report) for report in reports],
        }
        write_json(self.folder / f"{STATE}.json", state)
        for old in self.folder.glob(f"{STATE}-*.safetensors"):
            if old.name != name:
                old.unlink()

    def restore(self, conversion: Conversion) -> list[LayerReport]:
        """Set a conversion to what :meth:`store` kept last; its reports until then."""
        state = self._json(STATE)
        if state is None:
            return []
        hidden = self._tensors(state["streams"])
        conversion.dense.hidden_BSD = hidden["dense"]
        for k, stream in conversion.streams.items():
            stream.hidden_BSD = hidden[str(k)]
        conversion.ridges = {
            int(k): (pair[0], pair[1]) for k, pair in state["ridges"].items()
        }
        conversion.next_layer = state["next_layer"]
        return [_report(row) for row in state["reports"]]

    @contextmanager
    def published(
        self,
        source: DenseLayers,
        config: ExpertModelConfig,
        tokenizer: PreTrainedTokenizerBase,
    ) -> Iterator[Path]:
        """The layers in a folder that becomes the output, whole, if the block succeeds."""
        with replace_folder(self.target) as made:
            files = sorted(self.folder.glob("layer-*.safetensors"))
            for file in (*files, self.folder / OTHER):
                _link(file, made / file.name)
            write_config(made, source.config, config)
            tokenizer.save_pretrained(made)
            yield made
        shutil.rmtree(self.folder, ignore_errors=True)

    def _json(self, name: str) -> Any:
        try:
            return json.loads((self.folder / f"{name}.json").read_text("utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise self._damaged(f"{name}.json", error) from None

    def _tensors(self, name: str) -> dict[str, Tensor]:
        try:
            mapped = load_file(self.folder / name)
            # Matrix products may round otherwise where memory is aligned otherwise.
            return {key: tensor.clone() for key, tensor in mapped.items()}
        except (OSError, SafetensorError) as error:
            raise self._damaged(name, error) from None

    def _damaged(self, name: str, error: Exception) -> ModelError:
        return ModelError(
            f"{self.folder / name} is damaged ({error}); remove {self.folder} to begin "
            "the bootstrap again"
        )


def _link(file: Path, place: Path) -> None:
    """One file in two places, without a second copy where the file system can."""
    try:
        os.link(file, place)
    except OSError:
        shutil.copy2(file, place)


def _report(row: dict[str, Any]) -> LayerReport:
    by_k = {
        name: {int(k): value for k, value in row[name].items()}
        for name in ("visits", "error", "left", "ridges")
    }
    by_k["ridges"] = {k: (pair[0], pair[1]) for k, pair in by_k["ridges"].items()}
    return LayerReport(**(row | by_k))
