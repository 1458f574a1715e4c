"""``samv2 export``: a plain Hugging Face folder that loads without samv2."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from samv2.cli import existing_folder


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "export",
        help="merge adapters and experts into a plain Hugging Face model",
        description="Writes the run's (or bootstrapped folder's) model with every expert "
        "re-joined and every adapter merged: the K = E model, as an ordinary Llama "
        "folder. 4-bit blocks are exported as the weights that they stand for.",
    )
    parser.add_argument(
        "model",
        type=existing_folder,
        metavar="MODEL_OR_RUN",
        help="run directory or bootstrapped folder",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder to write"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a model in DIR"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the exported weights; bfloat16 halves the size and rounds what was "
        "trained (default: float32)",
    )
    parser.add_argument(
        "--peft",
        action="store_true",
        help="also write DIR/adapter for peft.PeftModel.from_pretrained: the run as LoRA "
        "on its dense model. The run must visit every expert (K = E)",
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="with --peft: the dense model that a bootstrapped folder was made of; left "
        "out, such a run's adapter is for DIR/base, its re-joined experts",
    )
    parser.add_argument(
        "--sibling",
        metavar="N",
        help="of a run with adapter siblings: which to merge, or 'mean' for all alike; "
        "siblings.json in the run says which client's text each is for",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    from samv2.common.errors import ConfigError
    from samv2.common.files import replace_folder
    from samv2.common.telemetry import make_console
    from samv2.federated.peft_base import write_peft
    from samv2.federated.run_folder import check_output, load_model_or_run
    from samv2.models.export import export_dense
    from samv2.models.llama_loader import DTYPES
    from samv2.models.one_sibling import keep_sibling

    output: Path = arguments.output
    console = make_console()
    if arguments.base and not arguments.peft:
        raise ConfigError(["--base is for an adapter; give --peft too"])
    check_output(output, overwrite=arguments.overwrite, expert=False)
    model, tokenizer, name = load_model_or_run(arguments.model)
    if arguments.sibling is not None:
        model = keep_sibling(model, arguments.sibling)
    dense = export_dense(model, dtype=DTYPES[arguments.dtype])
    with replace_folder(output) as folder:
        if arguments.peft:
            base = write_peft(
                arguments.model, model, folder, place=output, given=arguments.base
            )
        dense.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    console.print(
        f"Exported {name} to {output}. Load it with transformers:\n"
        f'  AutoModelForCausalLM.from_pretrained("{output}")'
    )
    if arguments.peft:
        console.print(
            "The adapter alone, with PEFT:\n"
            f'  PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), '
            f'"{output / "adapter"}")',
            soft_wrap=True,
        )
    return 0
