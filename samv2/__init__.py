"""SAM-v2: pre-trained LLMs as expert graphs, fine-tuned across clients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samv2.models.expert_model import ExpertModel

__version__ = "0.1.0"
__all__ = ["ExpertModel", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used; the command line stays quick."""
    if name == "ExpertModel":
        from samv2.models.expert_model import ExpertModel

        return ExpertModel
    raise AttributeError(f"module 'samv2' has no attribute {name!r}")
