"""`Trainer(devices=...)`, read by Lightning's rules."""

from __future__ import annotations

from trainyard.accelerators.base import Devices
from trainyard.errors import MisconfigurationException


def device_count(devices: Devices, *, auto: int) -> int:
    """For devices that have no numbers. Raises MisconfigurationException."""
    value = _read(devices)
    if value == "auto":
        return auto
    if not isinstance(value, int) or value < 1:
        raise MisconfigurationException(
            f"devices: {devices!r}; with accelerator='cpu' it is the number of processes, at least 1, or 'auto'"
        )
    return value


def device_indices(devices: Devices, *, available: int, kind: str) -> list[int]:
    """For numbered devices. Raises MisconfigurationException."""
    value = _read(devices)
    if value in ("auto", -1):
        value = list(range(available))
    elif isinstance(value, int):
        if value > available:
            raise MisconfigurationException(
                f"devices: {devices!r} asks for {value}; {_seen(available, kind)}"
            )
        value = list(range(value)) if value > 0 else []
    if not value or isinstance(value, str):
        raise MisconfigurationException(f"devices: {devices!r} selects none; {_seen(available, kind)}")
    beyond = [index for index in value if not 0 <= index < available]
    if beyond:
        raise MisconfigurationException(f"devices: {devices!r} names {beyond[0]}; {_seen(available, kind)}")
    if len(set(value)) < len(value):
        raise MisconfigurationException(f"devices: {devices!r} names a device twice")
    return value


def _read(devices: Devices) -> int | str | list[int]:
    """An int, "auto" or a list of ints."""
    if isinstance(devices, str):
        text = devices.strip()
        if text == "auto":
            return text
        try:
            return [int(part) for part in text.split(",") if part.strip()] if "," in text else int(text)
        except ValueError:
            raise _unreadable(devices) from None
    if isinstance(devices, list | tuple):
        if any(isinstance(index, bool) or not isinstance(index, int) for index in devices):
            raise _unreadable(devices)
        return list(devices)
    if isinstance(devices, bool) or not isinstance(devices, int):
        raise _unreadable(devices)
    return devices


def _unreadable(devices: object) -> MisconfigurationException:
    return MisconfigurationException(
        f"devices: {devices!r} is not a count, a list of indices, 'auto', '-1', or a string like '2' or '0,1'"
    )


def _seen(available: int, kind: str) -> str:
    return f"torch sees {available} {kind} device{'' if available == 1 else 's'} here"
