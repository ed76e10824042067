"""GPUs that torch drives through its "cuda" device: NVIDIA's, and AMD's with ROCm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainyard.accelerators.base import Accelerator, Devices
from trainyard.accelerators.parse import device_indices
from trainyard.errors import MisconfigurationException

if TYPE_CHECKING:
    import torch


class CUDAAccelerator(Accelerator):
    """One process a GPU."""

    device_type = "cuda"

    @staticmethod
    def name() -> str:
        return "cuda"

    @staticmethod
    def is_available() -> bool:
        return CUDAAccelerator.auto_device_count() > 0

    @staticmethod
    def auto_device_count() -> int:
        # Not torch.cuda.is_available(): that starts the driver, after which a fork cannot use it (torch's documentation).
        import torch

        return torch.cuda.device_count()

    @staticmethod
    def parse_devices(devices: Devices) -> list[int]:
        return device_indices(devices, available=CUDAAccelerator.auto_device_count(), kind="CUDA")

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        import torch

        return [torch.device("cuda", index) for index in devices]

    def setup_device(self, device: torch.device) -> None:
        import torch

        torch.accelerator.set_device_index(device)

    def get_device_stats(self, device: torch.device) -> dict[str, float]:
        """The allocator's counters, as `torch.cuda.memory_stats` names them (bytes, or numbers of blocks)."""
        import torch

        stats: dict[str, Any] = torch.cuda.memory_stats(device)
        return {name: float(value) for name, value in stats.items()}

    def teardown(self) -> None:
        import torch

        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.accelerator.empty_cache()


def find_usable_cuda_devices(num_devices: int = -1) -> list[int]:
    """Indices of GPUs that take an allocation: another process may have one in exclusive mode.

    Starts the driver. -1: all of them. Raises MisconfigurationException when there are fewer than `num_devices`.
    """
    import torch

    found: list[int] = []
    for index in range(CUDAAccelerator.auto_device_count()):
        if len(found) == num_devices:
            break
        try:
            torch.zeros(1, device=torch.device("cuda", index))
        except RuntimeError:
            continue
        found.append(index)
    if len(found) < num_devices:
        raise MisconfigurationException(
            f"num_devices: {num_devices} asked for, {len(found)} of the {CUDAAccelerator.auto_device_count()} CUDA devices "
            "here can be used"
        )
    return found
