"""Rates over a sliding window, and what a device could do at best."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

_PEAKS: dict[str, dict[str, float]] = {
    "b200": {"16": 2250e12, "tf32": 1100e12, "32": 75e12},
    "h200": {"16": 989.4e12, "tf32": 494.7e12, "32": 66.9e12},
    "h100 pcie": {"16": 756e12, "tf32": 378e12, "32": 51e12},
    "h100 nvl": {"16": 835e12, "tf32": 417.5e12, "32": 60e12},
    "h100": {"16": 989.4e12, "tf32": 494.7e12, "32": 66.9e12},
    "a100": {"16": 312e12, "tf32": 156e12, "32": 19.5e12},
    "l40s": {"16": 362e12, "tf32": 183e12, "32": 91.6e12},
    "l40": {"16": 181e12, "tf32": 90.5e12, "32": 90.5e12},
    "l4": {"16": 121e12, "tf32": 60e12, "32": 30.3e12},
    "a10": {"16": 125e12, "tf32": 62.5e12, "32": 31.2e12},
    "a10g": {"16": 70e12, "tf32": 35e12, "32": 35e12},
    "v100": {"16": 125e12, "tf32": 15.7e12, "32": 15.7e12},
    "t4": {"16": 65e12, "tf32": 8.1e12, "32": 8.1e12},
}
"""Operations a second of dense matrix products, from NVIDIA's data sheets; the first name whose words the
device's name has counts."""


@dataclass(frozen=True, slots=True)
class _Point:
    """Totals since the start."""

    time: float
    batches: int
    samples: int
    lengths: int | None
    flops: float | None


class Throughput:
    """`lightning.fabric.utilities.throughput.Throughput`: `update` with totals since the start, `compute` the rates.

    `available_flops`: what the device can do in a second, for the utilisation (`mfu`: A. Chowdhery et al., "PaLM",
    2022, arXiv:2204.02311, appendix B); `window_size` in batches. Raises ValueError for totals that fall.
    """

    def __init__(
        self,
        available_flops: float | None = None,
        world_size: int = 1,
        window_size: int = 100,
        separator: str = "/",
    ) -> None:
        if world_size < 1 or window_size < 2:
            raise ValueError(
                f"world_size={world_size} must be at least 1, window_size={window_size} at least 2"
            )
        self.available_flops, self.world_size = available_flops, world_size
        self.window_size, self.separator = window_size, separator
        self._points: deque[_Point] = deque()
        self._flops: float | None = None

    def update(
        self,
        *,
        time: float,
        batches: int,
        samples: int,
        lengths: int | None = None,
        flops: float | None = None,
    ) -> None:
        """`time` in seconds, `lengths` in whatever items samples consist of; `flops`: of this device since the last update."""
        if self._points and (time < self._points[-1].time or batches < self._points[-1].batches):
            raise ValueError(f"time={time}, batches={batches}: totals do not fall")
        if flops is not None:
            self._flops = (self._flops or 0.0) + flops
        self._points.append(_Point(time, batches, samples, lengths, self._flops))
        while len(self._points) > 2 and batches - self._points[1].batches >= self.window_size:
            self._points.popleft()

    def compute(self) -> dict[str, float]:
        """Totals, and rates of this device (`device/...`) and, in a world of several, of all."""
        if not self._points:
            return {}
        first, last = self._points[0], self._points[-1]
        found: dict[str, float] = {"time": last.time, "batches": last.batches, "samples": last.samples}
        if last.lengths is not None:
            found["lengths"] = last.lengths
        elapsed = last.time - first.time
        if elapsed <= 0:
            return found
        rates = {
            "batches_per_sec": (last.batches - first.batches) / elapsed,
            "samples_per_sec": (last.samples - first.samples) / elapsed,
        }
        if last.lengths is not None and first.lengths is not None:
            rates["items_per_sec"] = (last.lengths - first.lengths) / elapsed
        if last.flops is not None:
            rates["flops_per_sec"] = (last.flops - (first.flops or 0.0)) / elapsed
        if self.world_size > 1:
            found.update({name: rate * self.world_size for name, rate in rates.items()})
        found.update({f"device{self.separator}{name}": rate for name, rate in rates.items()})
        if self.available_flops and "flops_per_sec" in rates:
            found[f"device{self.separator}mfu"] = rates["flops_per_sec"] / self.available_flops
        return found

    def reset(self) -> None:
        self._points.clear()
        self._flops = None


def get_available_flops(device_name: str, precision: str, *, tf32: bool = False) -> float | None:
    """Operations a second that the device could do at best; None if nothing is known about it.

    `device_name` as torch gives it ("NVIDIA H100 80GB HBM3"), `precision` as a Trainer names it ("bf16-mixed").
    """
    words = device_name.lower().replace("-", " ").split()
    peaks = next((p for name, p in _PEAKS.items() if all(word in words for word in name.split())), None)
    if peaks is None or precision.startswith("64"):
        return None
    return peaks["16" if "16" in precision else "tf32" if tf32 else "32"]
