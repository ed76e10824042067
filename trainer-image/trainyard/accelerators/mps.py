"""The GPU of an Apple computer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainyard.accelerators.base import Accelerator, Devices
from trainyard.accelerators.parse import device_indices

if TYPE_CHECKING:
    import torch


class MPSAccelerator(Accelerator):
    """There is one; several processes cannot share it for training (torch.distributed has no backend for it)."""

    device_type = "mps"

    @staticmethod
    def name() -> str:
        return "mps"

    @staticmethod
    def is_available() -> bool:
        import torch

        return torch.backends.mps.is_available()

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def parse_devices(devices: Devices) -> list[int]:
        return device_indices(devices, available=1, kind="MPS")

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        import torch

        return [torch.device("mps", index) for index in devices]

    def get_device_stats(self, device: torch.device) -> dict[str, float]:
        """Bytes: held by tensors, and by the driver."""
        import torch

        return {
            "mps_current_allocated": float(torch.mps.current_allocated_memory()),
            "mps_driver_allocated": float(torch.mps.driver_allocated_memory()),
        }

    def teardown(self) -> None:
        import torch

        torch.mps.empty_cache()
