"""What a bootstrap does to a converted folder before the folder takes its name.

converted → gradient stage (``distill.steps``) → factors (``adapter.factors``)
→ 4-bit blocks (``experts.quantise``)
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from samv2.federated.frontier_inputs import FrontierInputs
from samv2.federated.phases import Phases
from samv2.models.distilled_folder import distill_folder
from samv2.models.gradient_factors import GRADIENT, fit_factors
from samv2.models.quantised_blocks import NF4, quantise_folder
from samv2.models.save import load_expert_model, save_expert_model
from samv2.models.streamed_bootstrap import StreamedBootstrap
from samv2.models.streamed_scores import score_folder

LEARNING = "Learning from the dense model (steps)"
AIMING = "Aiming adapters (batches)"
QUANTISING = "Quantising expert blocks (layers)"
SCORING = "Scoring the 4-bit model (layers)"


def finish(
    folder: Path, made: StreamedBootstrap, *, inputs: FrontierInputs, phases: Phases
) -> StreamedBootstrap:
    """Do what the settings ask for beyond the conversion.

    Args:
        folder: the converted model; rewritten.
        made: of the conversion.
        inputs: model, text and settings.
        phases: where progress is shown.

    Returns:
        The same with the scores of what the folder is now.
    """
    if inputs.settings.distill.steps:
        made = _learn(folder, made, inputs, phases)
    if inputs.settings.adapter.factors == GRADIENT:
        made = _aim(folder, made, inputs, phases)
    if inputs.settings.experts.quantise == NF4:
        made = _quantise(folder, made, inputs, phases)
    return made


def _learn(
    folder: Path, made: StreamedBootstrap, inputs: FrontierInputs, phases: Phases
) -> StreamedBootstrap:
    """The gradient stage; scores are those after it."""
    phases.start(LEARNING, total=inputs.settings.distill.steps)
    found, scores = distill_folder(
        folder,
        inputs.source.folder,
        inputs.calibration_NS,
        inputs.heldout,
        inputs.settings,
        progress=phases.advance,
    )
    for k in sorted(found.before):
        phases.say(
            f"K = {k}: KL to the dense model on text kept from training, nats a token: "
            f"{found.before[k]:.3f} before, {found.after[k]:.3f} after"
        )
    if not found.kept:
        phases.say(
            "[yellow]The gradient stage did not help and was undone; lower "
            "distill.learning_rate, or give it more steps and text.[/yellow]"
        )
    return replace(made, scores=made.scores | scores)


def _aim(
    folder: Path, made: StreamedBootstrap, inputs: FrontierInputs, phases: Phases
) -> StreamedBootstrap:
    """Adapter factors along gradients; nothing is trained yet, so scores stay."""
    phases.start(AIMING)
    model, tokenizer = load_expert_model(folder)
    fit_factors(model, inputs.calibration_NS, progress=phases.advance)
    save_expert_model(model, tokenizer, folder)
    return replace(made, config=model.expert_config)


def _quantise(
    folder: Path, made: StreamedBootstrap, inputs: FrontierInputs, phases: Phases
) -> StreamedBootstrap:
    """4-bit blocks; scores are those after it, and those before are kept beside them."""
    total, ks = inputs.source.num_layers, sorted(made.scores)
    phases.start(QUANTISING, total=total)
    quantise_folder(folder, progress=phases.advance)
    phases.start(SCORING, total=total)
    scores = score_folder(
        folder, inputs.source, inputs.heldout, ks, progress=phases.advance
    )
    return replace(
        made,
        config=replace(made.config, quantise=NF4),
        scores=scores,
        unquantised_scores=made.scores,
    )
