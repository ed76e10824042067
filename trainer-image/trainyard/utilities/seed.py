"""Seeds, under the import path that ported code uses."""

from trainyard.reproducibility import isolate_rng, seed_everything

__all__ = ["isolate_rng", "seed_everything"]
