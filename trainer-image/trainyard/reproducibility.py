"""Seeds, and the state of all random generators of this process as tensors and primitives."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Iterator
from typing import Any

SEED_ENV = "PL_GLOBAL_SEED"
WORKERS_ENV = "PL_SEED_WORKERS"


def seed_everything(seed: int | None = None, workers: bool = False, verbose: bool = True) -> int:
    """Seed random, numpy and torch; returns the seed. As Lightning's: None reads PL_GLOBAL_SEED, else takes 0.

    Raises ValueError for a seed outside of numpy's range [0, 2**32).
    """
    import numpy as np
    import torch

    if seed is None:
        text = os.environ.get(SEED_ENV, "0")
        try:
            seed = int(text)
        except ValueError:
            raise ValueError(f"{SEED_ENV}: {text!r} is not an integer") from None
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: {seed} is not in [0, 2**32)")
    if verbose and int(os.environ.get("RANK", "0")) == 0:
        print(f"Seed set to {seed}", flush=True)
    os.environ[SEED_ENV] = str(seed)
    os.environ[WORKERS_ENV] = str(int(workers))
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed


def global_seed() -> int:
    """What seed_everything was told, 0 if nothing."""
    return int(os.environ.get(SEED_ENV, "0"))


def derived_seed(*parts: object) -> int:
    """63 bits that depend on all parts, and on nothing else: not on the process, platform or version."""
    digest = hashlib.sha256("/".join(str(p) for p in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def reseed(seed: int) -> None:
    """Seed all generators of this process, without the traces that seed_everything leaves in the environment."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The state of python's, numpy's and torch's generators (CPU, and this process's CUDA device if it has one)."""
    import numpy as np
    import torch

    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss],
        "numpy": [
            kind,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """The inverse of `rng_state`."""
    import numpy as np
    import torch

    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def isolate_rng() -> Iterator[None]:
    """What happens inside draws from the generators, and leaves them as they were."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)
