"""What the processes of a run compute on: `Trainer(accelerator=..., devices=...)`."""

from __future__ import annotations

import difflib
from importlib import import_module

from trainyard.accelerators.base import Accelerator, Devices
from trainyard.accelerators.cpu import CPUAccelerator
from trainyard.accelerators.cuda import CUDAAccelerator, find_usable_cuda_devices
from trainyard.accelerators.mps import MPSAccelerator
from trainyard.accelerators.xla import XLAAccelerator
from trainyard.errors import MisconfigurationException

__all__ = [
    "ACCELERATORS",
    "Accelerator",
    "CPUAccelerator",
    "CUDAAccelerator",
    "Devices",
    "MPSAccelerator",
    "XLAAccelerator",
    "auto_device_count",
    "find_usable_cuda_devices",
    "make_accelerator",
]

ACCELERATORS: dict[str, tuple[str, ...]] = {
    "cpu": ("trainyard.accelerators.cpu:CPUAccelerator",),
    "cuda": ("trainyard.accelerators.cuda:CUDAAccelerator",),
    "mps": ("trainyard.accelerators.mps:MPSAccelerator",),
    "tpu": ("trainyard.accelerators.xla:XLAAccelerator",),
    "gpu": ("trainyard.accelerators.cuda:CUDAAccelerator", "trainyard.accelerators.mps:MPSAccelerator"),
}
"""By the name in `Trainer(accelerator=...)`: where its class is; the first one that is available is taken."""
_AUTO = ("gpu", "cpu")
"""After a TPU."""


def make_accelerator(name: str | Accelerator = "auto") -> Accelerator:
    """Raises MisconfigurationException for an unknown one, and for one that is not here."""
    if isinstance(name, Accelerator):
        return name
    wanted = str(name).lower()
    if wanted != "auto" and wanted not in ACCELERATORS:
        near = difflib.get_close_matches(wanted, ACCELERATORS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        known = ", ".join(repr(n) for n in ("auto", *ACCELERATORS))
        raise MisconfigurationException(f"accelerator: {name!r} is none of {known}{hint}")
    if wanted == "auto" and XLAAccelerator.has_tpu():
        return XLAAccelerator()
    for kind in _AUTO if wanted == "auto" else (wanted,):
        for accelerator in map(_load, ACCELERATORS[kind]):
            if accelerator.is_available():
                return accelerator()
    if wanted == "tpu":
        raise MisconfigurationException(f"accelerator: {name!r} {XLAAccelerator.obstacle()}")
    seen = "CUDA nor MPS" if wanted == "gpu" else wanted.upper()
    neither = "neither" if wanted == "gpu" else "no"
    raise MisconfigurationException(
        f"accelerator: {name!r}, but torch sees {neither} {seen} device here (use 'auto' or 'cpu', or a torch that was "
        "built for it)"
    )


def auto_device_count(name: str | Accelerator = "auto") -> int:
    """Processes of one node for `devices="auto"`."""
    return make_accelerator(name).auto_device_count()


def _load(where: str) -> type[Accelerator]:
    module, _, name = where.partition(":")
    found: type[Accelerator] = getattr(import_module(module), name)
    return found
