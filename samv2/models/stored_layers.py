"""An expert model's folder, read one decoder layer at a time.

Shapes: E experts, F rows an expert, D model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from samv2.common.errors import ModelError
from samv2.common.files import flush
from samv2.experts.moe_layers import ExpertGraphMLP
from samv2.models.dense_layers import opened_weights
from samv2.models.save import layer_from, misfit, read_expert_config

OTHER = "other.safetensors"
"""What belongs to no decoder layer."""


def layer_file(index: int) -> str:
    """What the file of one decoder layer is called."""
    return f"layer-{index:05d}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replace a safetensors file, flushed before it takes the name."""
    made = path.with_suffix(".new")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        made,
        metadata={"format": "pt"},
    )
    made.chmod(made.parent.stat().st_mode & 0o666)  # safetensors leaves it to its owner
    flush(made)
    made.replace(path)


class StoredLayers:
    """The tensors of a bootstrapped folder; none of them is kept.

    Args:
        folder: of one or more safetensors files, however the layers lie in them.

    Raises:
        ModelError: the config or a file's header is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.config, self.dense = read_expert_config(self.folder)
        self._files: dict[str, Path] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            with opened_weights(file) as weights:
                self._files |= dict.fromkeys(weights.keys(), file)

    def layer(self, index: int) -> dict[str, Tensor]:
        """The tensors of a decoder layer, by the names they have on disk."""
        prefix = f"model.layers.{index}."
        return self._read(name for name in self._files if name.startswith(prefix))

    def others(self) -> dict[str, Tensor]:
        """The tensors that belong to no decoder layer."""
        return self._read(
            name for name in self._files if not name.startswith("model.layers.")
        )

    def experts(self, index: int, tensors: Mapping[str, Tensor]) -> ExpertGraphMLP:
        """The expert graph of a converted decoder layer, without an assembler.

        Args:
            index: of the decoder layer; must be one of the config's.
            tensors: of that layer.

        Raises:
            ModelError: a tensor is missing or damaged.
        """
        position = self.config.layers.index(index)
        try:
            return layer_from(tensors, mlp_prefix(index), position, self.config)
        except (ModelError, RuntimeError) as error:
            raise misfit(self.folder, error) from None

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name in names:
            with opened_weights(self._files[name]) as weights:
                tensors[name] = weights.get_tensor(name)
        return tensors


def mlp_prefix(index: int) -> str:
    """What the names of a decoder layer's FFN begin with."""
    return f"model.layers.{index}.mlp."
