"""The federation's fixtures: a private cache and the bootstrapped tiny model."""

from tests.federated.conftest import expert_folder, private_cache

__all__ = ["expert_folder", "private_cache"]
