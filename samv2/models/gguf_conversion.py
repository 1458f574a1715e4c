"""GGUF files as folders of safetensors: converted once, checked on every use.

The values of a 4-bit GGUF are not bfloat16 numbers, so a conversion is stored in float32
(79 % of SmolLM2's would be rounded); where all values are bfloat16, in bfloat16. Either
way nothing is lost.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch
from filelock import FileLock
from gguf import GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from samv2.common.errors import ModelError
from samv2.common.fetch import Progress
from samv2.models.model_files import check_llama_like, model_fingerprint

log = logging.getLogger(__name__)

CONVERSION_VERSION = 1
"""Part of a conversion's folder name; a change converts every GGUF file anew."""

_MARKER = "samv2_conversion.json"


def converted_folder(gguf: Path, cache: Path, progress: Progress | None) -> Path:
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
