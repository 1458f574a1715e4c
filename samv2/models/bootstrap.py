"""Bootstrap: a dense model becomes an expert graph, layer by layer, without training.

1. *Survey.* Calibration text runs through the dense model. At every layer to convert, its
   FFN's rows are clustered into experts, gate and surrogates are fitted, and the error
   is measured that fewer visits would add.
2. *Allocation.* For each K, layers get the visits that add the least error in all, at no
   more arithmetic than K visits everywhere.
3. *Conversion.* The text runs through once more, as one dense stream and one stream a K.
   Each layer is repaired for each K on the stream of its own converted layers, to bring
   it back to the dense one, and its *repaired* output feeds the next layer.
4. *Logit scales.* One factor for each K, on text that the repairs did not see.

Shapes: B sequences, S positions, D model width, M FFN rows, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from samv2.common.errors import ModelError
from samv2.common.settings import Settings
from samv2.experts.allocation import allocate
from samv2.experts.balanced_kmeans import check_divisible
from samv2.experts.emoe_cluster import ClusterStats
from samv2.models.assembler import Assembler
from samv2.models.conversion import Conversion, LayerReport
from samv2.models.convert_layer import Surveyed, survey_layer
from samv2.models.expert_config import ExpertModelConfig
from samv2.models.expert_model import ExpertModel
from samv2.models.logit_scale import split_calibration
from samv2.models.perplexity import last_states
from samv2.models.text_stream import DenseSource, LlamaLayers, TextStream

Progress = Callable[[int, int], None]
"""Called with (layers done, layers in all); the survey and the conversion both count."""
SURVEYED_TOKENS = 8192
"""The survey reads at most so many of the calibration tokens."""


@dataclass(frozen=True, kw_only=True)
class Bootstrapped:
    """The converted model and what was measured on the way."""

    model: ExpertModel
    cluster_stats: tuple[ClusterStats, ...]
    layers: tuple[LayerReport, ...]


def parse_layers(spec: str, num_layers: int) -> tuple[int, ...]:
    """Indices named by ``all`` or by ranges such as ``1-``, ``4-20,25``.

    Raises:
        ModelError: the text is not of that form, or names a layer that is not there.
    """
    if spec.strip() == "all":
        return tuple(range(num_layers))
    chosen: set[int] = set()
    for part in spec.split(","):
        match = re.fullmatch(r"(\d+)(-(\d*))?", part.strip())
        if match is None:
            raise ModelError(
                f"experts.layers is {spec!r}; write 'all' or ranges such as '1-' or "
                "'4-20,25'"
            )
        first = int(match[1])
        last = first if match[2] is None else int(match[3] or num_layers - 1)
        if not first <= last < num_layers:
            raise ModelError(
                f"experts.layers names {part.strip()!r}, but the model has layers "
                f"0..{num_layers - 1}"
            )
        chosen.update(range(first, last + 1))
    return tuple(sorted(chosen))


def check_convertible(config: PretrainedConfig, settings: Settings) -> tuple[int, ...]:
    """Check everything that can be checked on a dense model's config, before long work.

    Returns:
        The indices of the layers to convert.

    Raises:
        ModelError: E does not divide the FFN, a layer is not there, the rank is too big.
    """
    check_divisible(config.intermediate_size, settings.experts.num_experts)
    for name, value in (
        ("adapter.rank", settings.adapter.rank),
        ("experts.surrogate_rank", settings.experts.surrogate_rank),
    ):
        if value > config.hidden_size:
            raise ModelError(
                f"{name} is {value}; it cannot exceed the model's width "
                f"{config.hidden_size}"
            )
    return parse_layers(settings.experts.layers, config.num_hidden_layers)


def initial_config(
    layers: tuple[int, ...], settings: Settings, fingerprint: str = ""
) -> ExpertModelConfig:
    """The config of the model that settings ask for, before visits are allocated.

    Args:
        layers: indices of the decoder layers to convert.
        settings: sections ``experts``, ``adapter``, ``assembler`` and the seed are used.
        fingerprint: of the dense model.
    """
    experts, unit = settings.experts, settings.experts.combine == "unit"
    wanted = {experts.experts_per_token, *experts.other_k} - {experts.num_experts}
    repaired = tuple(sorted(wanted)) if experts.repair and unit else ()
    return ExpertModelConfig(
        layers=layers,
        num_experts=experts.num_experts,
        experts_per_token=experts.experts_per_token,
        num_shared=experts.num_shared,
        combine=experts.combine,
        chains=experts.chains,
        surrogate_rank=experts.surrogate_rank if unit else 0,
        repaired=repaired,
        repair_rank=experts.repair_rank if repaired else 0,
        adapter_rank=settings.adapter.rank,
        adapter_scale=settings.adapter.scale,
        siblings=settings.adapter.siblings,
        assembler_width=settings.assembler.width,
        prefix_tokens=settings.assembler.prefix_tokens,
        seed=settings.seed,
        base_fingerprint=fingerprint,
    )


@torch.no_grad()
def bootstrap(
    llama: PreTrainedModel,
    calibration_BS: Tensor,
    settings: Settings,
    *,
    fingerprint: str = "",
    progress: Progress | None = None,
) -> Bootstrapped:
    """Convert a dense model in memory, in place.

    Args:
        llama: dense Llama-style causal LM in evaluation mode; its converted decoder
            layers are replaced.
        calibration_BS: (B, S) int64 token ids of calibration text.
        settings: sections ``experts``, ``adapter``, ``assembler`` and the seed are used.
        fingerprint: of the dense model, kept in the converted one's config.
        progress: called after every layer.

    Returns:
        The model, walking its initial graph, with zero adapters.

    Raises:
        ModelError: see :func:`check_convertible`.
    """
    layers = check_convertible(llama.config, settings)
    config = initial_config(layers, settings, fingerprint)
    fitted_BS, reserved_BS = split_calibration(calibration_BS)
    wanted_BSD = last_states(llama, reserved_BS) if config.repaired else None
    source = LlamaLayers(llama)
    counter = _Counter(2 * (layers[-1] + 1), progress)
    surveyed = survey(source, fitted_BS, config, settings, counter.step)
    config = with_visits(config, surveyed, llama.config, settings)
    assembler = make_assembler(llama.config.hidden_size, config)
    conversion = Conversion(source, fitted_BS, config)
    decoder, reports = llama.model.layers, []
    for index, layer, report in conversion.run(surveyed):
        if report is not None:
            layer.mlp.assembler = assembler
            decoder[index] = layer
            reports.append(report)
        counter.step()
    model = ExpertModel(llama, assembler, config)
    if wanted_BSD is not None:
        model.fit_logit_scales(reserved_BS, wanted_BSD)
    model.freeze_base()
    return Bootstrapped(
        model=model.eval(),
        cluster_stats=tuple(one.stats for one in surveyed),
        layers=tuple(reports),
    )


def make_assembler(model_width: int, config: ExpertModelConfig) -> Assembler | None:
    """The assembler that a config asks for, in its initial, fully open state."""
    if config.assembler_width == 0:
        return None
    return Assembler(
        model_width=model_width,
        num_layers=len(config.layers),
        num_experts=config.num_experts,
        hidden_width=config.assembler_width,
        seed=config.seed,
    )


@torch.no_grad()
def survey(
    source: DenseSource,
    calibration_BS: Tensor,
    config: ExpertModelConfig,
    settings: Settings,
    advance: Callable[[], None] = lambda: None,
) -> list[Surveyed]:
    """Cluster and calibrate every layer to convert on the dense model's stream.

    Args:
        source: the dense model.
        calibration_BS: (B, S) int64; evenly spaced sequences of it are read.
        config: of the model to be made.
        settings: section ``experts`` and the seed are used.
        advance: called after every layer.
    """
    length = calibration_BS.shape[1]
    some_BS = spread(calibration_BS, max(1, SURVEYED_TOKENS // length))
    stream = TextStream(source.embed(some_BS), source.attention_inputs(length))
    found: list[Surveyed] = []
    for index in range(config.layers[-1] + 1):
        layer = source.layer(index)
        x_BSD, after_BSD = stream.attend(layer, index)
        if index in config.layers:
            x_ND, after_ND = x_BSD.flatten(0, 1), after_BSD.flatten(0, 1)
            found.append(
                survey_layer(len(found), layer.mlp, x_ND, after_ND, config, settings)
            )
        stream.advance(x_BSD, after_BSD, layer.mlp)
        advance()
    return found


def spread(rows_BS: Tensor, most: int) -> Tensor:
    """At most so many rows, evenly spaced."""
    if len(rows_BS) <= most:
        return rows_BS
    return rows_BS[torch.linspace(0, len(rows_BS) - 1, most).long()]


def with_visits(
    config: ExpertModelConfig,
    surveyed: Sequence[Surveyed],
    dense: PretrainedConfig,
    settings: Settings,
) -> ExpertModelConfig:
    """The config with the visits of every layer at every repaired K.

    The mean cost of the converted layers is at most that of K visits everywhere, and
    so is the sum of their errors.
    """
    if not settings.experts.allocate or not config.repaired:
        return config
    curves = [one.curve for one in surveyed]
    plain = replace(config, visits=())
    rows = []

    def total_error(visits: tuple[int, ...]) -> float:
        return sum(curve.at(k) for curve, k in zip(curves, visits))

    for k in config.repaired:

        def cost_of(visits: int) -> float:
            asked = replace(plain, repaired=(visits,))
            return asked.layer_flops(
                0,
                visits,
                model_width=dense.hidden_size,
                rows=dense.intermediate_size,
            )

        made = allocate(curves, cost_of, cost_of(k), around=k)
        rows.append(min(made, (k,) * len(curves), key=total_error))
    return replace(config, visits=tuple(rows))


class _Counter:
    """Survey and conversion as one progress."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def step(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)
