"""What kind of device the processes of a run compute on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

Devices = int | str | list[int]
"""`Trainer(devices=...)`: a count, indices, "auto", "-1" (all), "2" (a count), "0,1" (indices)."""


class Accelerator(ABC):
    """`lightning.pytorch.accelerators.Accelerator`: one class a kind of device, no state."""

    device_type: ClassVar[str]
    """torch's name for it."""

    @staticmethod
    @abstractmethod
    def name() -> str:
        """What `Trainer(accelerator=...)` calls it."""

    @staticmethod
    @abstractmethod
    def is_available() -> bool:
        """Whether torch can use such a device here. Starts no driver, so that processes can still be forked."""

    @staticmethod
    @abstractmethod
    def auto_device_count() -> int:
        """Processes of one node for `devices="auto"`."""

    @staticmethod
    @abstractmethod
    def parse_devices(devices: Devices) -> Any:
        """What `get_parallel_devices` takes. Raises MisconfigurationException that names `devices`."""

    @staticmethod
    @abstractmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """One device for each process of this node, by local rank."""

    def setup_device(self, device: torch.device) -> None:  # noqa: B027 - there need be nothing to do
        """Make `device` this process's own."""

    @abstractmethod
    def get_device_stats(self, device: torch.device) -> dict[str, float]:
        """What a monitor shows of `device`."""

    def teardown(self) -> None:  # noqa: B027
        """Free what is cached on the device."""
