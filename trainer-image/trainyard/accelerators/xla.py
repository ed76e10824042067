"""TPUs, and whatever else PyTorch/XLA drives through a PJRT plugin: one process a device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from trainyard.accelerators.base import Accelerator, Devices
from trainyard.accelerators.parse import device_indices
from trainyard.utilities.optional import has

if TYPE_CHECKING:
    import torch

DEVICE_ENV = "PJRT_DEVICE"
"""PyTorch/XLA's own variable: "TPU", "CPU" (for tests), "NEURON", ..."""


class XLAAccelerator(Accelerator):
    """`accelerator="tpu"`. With PJRT_DEVICE=CPU, torch_xla's CPU device stands in for it: any number of processes."""

    device_type = "xla"

    @staticmethod
    def name() -> str:
        return "tpu"

    @staticmethod
    def is_available() -> bool:
        return has("torch_xla") and (DEVICE_ENV in os.environ or _has_device_files())

    @staticmethod
    def has_tpu() -> bool:
        """Whether `accelerator="auto"` is this one: not for what PJRT_DEVICE puts in a TPU's place."""
        return has("torch_xla") and os.environ.get(DEVICE_ENV, "TPU") == "TPU" and _has_device_files()

    @staticmethod
    def obstacle() -> str | None:
        """Why it is not available, for a person."""
        if not has("torch_xla"):
            return (
                "needs PyTorch/XLA: pip install 'torch_xla[tpu]', in the version of the torch that is here (they are built "
                "for each other)"
            )
        if not XLAAccelerator.is_available():
            return f"finds no TPU; for PyTorch/XLA on another device set {DEVICE_ENV} (CPU, to try it out)"
        return None

    @staticmethod
    def auto_device_count() -> int:
        if os.environ.get(DEVICE_ENV, "TPU") != "TPU":
            return 1
        from torch_xla._internal import tpu

        return int(tpu.num_available_devices())  # one or two to a chip

    @staticmethod
    def parse_devices(devices: Devices) -> list[int]:
        available = XLAAccelerator.auto_device_count()
        if os.environ.get(DEVICE_ENV) == "CPU" and devices not in ("auto", -1, "-1"):
            available = os.cpu_count() or 1  # each process makes its own
        return device_indices(devices, available=available, kind="XLA")

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        """To count; each process sees its own as xla:0."""
        import torch

        return [torch.device("xla", index) for index in devices]

    def get_device_stats(self, device: torch.device) -> dict[str, float]:
        """Bytes on the device, where PJRT can tell."""
        import torch_xla.core.xla_model as xm

        try:
            info = xm.get_memory_info(device)
        except RuntimeError:
            return {}
        names = {
            "bytes_used": "xla_bytes_used",
            "bytes_limit": "xla_bytes_limit",
            "peak_bytes_used": "xla_bytes_peak",
        }
        return {ours: float(info[theirs]) for theirs, ours in names.items() if theirs in info}


def _has_device_files() -> bool:
    """By its device files: nothing is imported or started for it."""
    return any(Path("/dev").glob("accel[0-9]*")) or ("TPU_NAME" in os.environ and Path("/dev/vfio").exists())
