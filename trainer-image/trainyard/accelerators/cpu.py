"""The processor: any number of processes on one device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from trainyard.accelerators.base import Accelerator, Devices
from trainyard.accelerators.parse import device_count

if TYPE_CHECKING:
    import torch


class CPUAccelerator(Accelerator):
    """`devices` is the number of processes; "auto" is one."""

    device_type = "cpu"

    @staticmethod
    def name() -> str:
        return "cpu"

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def parse_devices(devices: Devices) -> int:
        return device_count(devices, auto=CPUAccelerator.auto_device_count())

    @staticmethod
    def get_parallel_devices(devices: int | str) -> list[torch.device]:
        import torch

        return [torch.device("cpu")] * CPUAccelerator.parse_devices(devices)

    def get_device_stats(self, device: torch.device) -> dict[str, float]:
        """In percent: load of a core over the last minute (above 100: processes wait), on Linux used memory and swap."""
        stats = {"cpu_percent": 100 * os.getloadavg()[0] / (os.cpu_count() or 1)}
        info = Path("/proc/meminfo")
        if info.exists():
            kib = {name: float(rest.split()[0]) for name, _, rest in _lines(info)}
            stats["cpu_vm_percent"] = 100 * (1 - kib["MemAvailable"] / kib["MemTotal"])
            total = kib.get("SwapTotal", 0.0)
            stats["cpu_swap_percent"] = 100 * (1 - kib["SwapFree"] / total) if total else 0.0
        return stats


def _lines(file: Path) -> list[tuple[str, str, str]]:
    return [line.partition(":") for line in file.read_text().splitlines()]
