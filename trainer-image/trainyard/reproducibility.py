"""Seeds, and the state of all random generators of this process as tensors and primitives."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import sys
from collections.abc import Iterator
from types import TracebackType
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
    _seed_xla(seed)
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
    import torch

    reseed_cpu(seed)
    torch.manual_seed(seed)
    _seed_xla(seed)


def reseed_cpu(seed: int) -> None:
    """As `reseed`, but of torch's generators that of the CPU alone: a few microseconds, and no device is touched."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The state of python's, numpy's and torch's generators: the CPU's, and those of all devices of this process.

    Tensors and primitives only. A device type that has not been used yet has no state that anybody could miss.
    """
    return portable(draws())


def draws() -> dict[str, Any]:
    """What `portable` makes an `rng_state` of, as the generators give it: half of the time."""
    import numpy as np
    import torch

    state: dict[str, Any] = {
        "python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(),
    }  # fmt: skip
    for kind, device in _devices():
        state[kind] = [device.get_rng_state()] if kind == "mps" else device.get_rng_state_all()
    if (xla := _xla()) is not None:
        state["xla"] = int(xla.get_rng_state())
    return state


def portable(drawn: dict[str, Any]) -> dict[str, Any]:
    """The `rng_state` of the moment at which `drawn` was taken."""
    import numpy as np
    import torch

    version, internal, gauss = drawn["python"]
    kind, keys, position, has_gauss, cached = drawn["numpy"]
    return {
        **drawn,
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss],
        "numpy": [
            kind,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """The inverse of `rng_state`. States of devices that are not here are left out."""
    import numpy as np
    import torch

    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    for kind, device in _devices(unused=True):
        if kind == "mps" and kind in state:
            device.set_rng_state(state[kind][0])
        elif kind in state:
            for index, one in enumerate(state[kind][: device.device_count()]):
                device.set_rng_state(one, index)
    if (xla := _xla()) is not None and "xla" in state:
        xla.set_rng_state(state["xla"])


def _xla() -> Any:
    """torch_xla.core.xla_model, once a strategy has imported it. Its generator is one number, for one device."""
    return sys.modules.get("torch_xla.core.xla_model")


def _seed_xla(seed: int) -> None:
    if (xla := _xla()) is not None:
        xla.set_rng_state(seed % 2**31)


def _devices(*, unused: bool = False) -> Iterator[tuple[str, Any]]:
    """The device modules (torch.cuda, torch.xpu, torch.mps) that are here; `unused`: also before their first use."""
    import torch

    for kind in ("cuda", "xpu", "mps"):
        device = getattr(torch, kind, None)
        available = getattr(torch.backends.mps if kind == "mps" else device, "is_available", lambda: False)
        if device is None or not available():
            continue
        if unused or getattr(device, "is_initialized", lambda: True)():
            yield kind, device


@contextlib.contextmanager
def isolate_rng(include_cuda: bool = True) -> Iterator[None]:
    """What happens inside draws from the generators, and leaves them as they were.

    `include_cuda`: those of devices too (Lightning's name for it).
    """
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state if include_cuda else {k: state[k] for k in ("python", "numpy", "torch")})


class OwnDraws:
    """`with draws:` what happens inside draws from generators of its own, and the next time goes on where they were.

    Of python's, numpy's and torch's CPU generators. It takes 20 us to enter and leave, where `isolate_rng` takes 300:
    numpy's generator is swapped, not copied (a half-used pair of its `randn` is lost by that).
    """

    def __init__(self, seed: int) -> None:
        import numpy as np
        import torch

        self._python: Any = random.Random(seed).getstate()  # noqa: S311 - not for secrets
        self._numpy: Any = np.random.MT19937(seed)
        self._torch = torch.Generator().manual_seed(seed).get_state()
        self._outer: Any = None

    def __enter__(self) -> None:
        import torch
        from numpy.random import mtrand

        self._outer = random.getstate(), mtrand.get_bit_generator(), torch.get_rng_state()
        random.setstate(self._python)
        mtrand.set_bit_generator(self._numpy)
        torch.default_generator.set_state(self._torch)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import torch
        from numpy.random import mtrand

        self._python, self._torch = random.getstate(), torch.get_rng_state()
        python, bits, state = self._outer
        random.setstate(python)
        mtrand.set_bit_generator(bits)
        torch.default_generator.set_state(state)
