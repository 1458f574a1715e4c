"""Expert blocks of a finished model to NF4: in memory, or a folder layer by layer.

It is the last step of a conversion: clustering, repair and training of repairs work on
floats. Adapters, gates, surrogates, the repairs' stand-ins and all that is no expert keep
their dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from samv2.common.errors import ModelError
from samv2.common.files import replace_folder
from samv2.models.expert_model import ExpertModel
from samv2.models.model_files import read_tokenizer
from samv2.models.save import stored_tensors, write_config
from samv2.models.stored_layers import (
    OTHER,
    StoredLayers,
    layer_file,
    mlp_prefix,
    write_tensors,
)

NF4 = "nf4"


def quantise_model(model: ExpertModel) -> None:
    """Pack the expert blocks of a model in memory, in place."""
    for layer in model.expert_layers:
        layer.quantise()
    model.expert_config = replace(model.expert_config, quantise=NF4)


def quantise_folder(
    folder: Path, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Replace a folder of float blocks by the same model with NF4 blocks.

    One layer is in memory at a time, and a crash leaves the folder as it was. Figures
    that were measured of it (``frontier.json``) do not pass to the new one.

    Args:
        folder: a bootstrapped model.
        progress: called with layers done and layers in all.

    Raises:
        ModelError: the folder is damaged, or its blocks are NF4 already.
    """
    stored = StoredLayers(folder)
    if stored.config.quantise != "none":
        raise ModelError(
            f"the expert blocks in {folder} are {stored.config.quantise} already; only "
            "float blocks can be quantised"
        )
    total = stored.dense.num_hidden_layers
    with replace_folder(Path(folder)) as made:
        for index in range(total):
            write_tensors(made / layer_file(index), _packed_layer(stored, index))
            progress(index + 1, total)
        write_tensors(made / OTHER, stored.others())
        write_config(made, stored.dense, replace(stored.config, quantise=NF4))
        read_tokenizer(stored.folder).save_pretrained(made)


def _packed_layer(stored: StoredLayers, index: int) -> dict[str, Tensor]:
    """A decoder layer's tensors, its blocks packed where it is converted."""
    tensors = stored.layer(index)
    if index not in stored.config.layers:
        return tensors
    mlp, prefix = stored.experts(index, tensors), mlp_prefix(index)
    mlp.quantise()
    kept = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
    return kept | stored_tensors(mlp, prefix)
