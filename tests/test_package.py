"""The packages import side by side with what they depend on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_kernels_folder_is_no_package() -> None:
    """transformers looks for an installed package named ``kernels``."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "samv2_kernels" / "__init__.py").exists()


@pytest.mark.parametrize(
    "code",
    [
        "import transformers; from transformers import LlamaForCausalLM",
        "from transformers import LlamaConfig, LlamaForCausalLM as M;"
        "M(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8,"
        "num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1))",
    ],
)
def test_transformers_works_from_the_root_of_the_repository(code: str) -> None:
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=ROOT,
        capture_output=True,
        timeout=120,
    )


def test_the_kernel_package_imports_without_the_library() -> None:
    code = (
        "import sys; sys.modules['samv2'] = sys.modules['transformers'] = None;"
        "import samv2_kernels; assert samv2_kernels.walk"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT / "kernels", timeout=120
    )
