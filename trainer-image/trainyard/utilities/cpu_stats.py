"""How busy this machine is, from /proc (proc(5)); from psutil where there is none."""

from __future__ import annotations

from pathlib import Path

from trainyard.utilities.optional import require

_PROC = Path("/proc")


class CPUStats:
    """`read()`: percentages, under psutil's names with `cpu_` before them. The first `cpu_percent` is since boot."""

    def __init__(self, proc: Path = _PROC) -> None:
        self._proc = proc
        self._busy = self._all = 0
        self._psutil = (
            None if (proc / "stat").exists() else require("psutil", "progress", "DeviceStatsMonitor")
        )

    def read(self) -> dict[str, float]:
        """`cpu_vm_percent`: of the memory, what is not available; `cpu_percent`: since the last call, over all cores;
        `cpu_swap_percent`."""
        if self._psutil is not None:
            return {
                "cpu_vm_percent": self._psutil.virtual_memory().percent,
                "cpu_percent": self._psutil.cpu_percent(),
                "cpu_swap_percent": self._psutil.swap_memory().percent,
            }
        memory = self._memory()
        used = memory["MemTotal"] - memory.get("MemAvailable", memory["MemFree"])
        swapped = memory.get("SwapTotal", 0) - memory.get("SwapFree", 0)
        return {
            "cpu_vm_percent": _percent(used, memory["MemTotal"]),
            "cpu_percent": self._busy_percent(),
            "cpu_swap_percent": _percent(swapped, memory.get("SwapTotal", 0)),
        }

    def _memory(self) -> dict[str, int]:
        lines = (self._proc / "meminfo").read_text().splitlines()
        return {
            name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if rest
        }

    def _busy_percent(self) -> float:
        fields = (self._proc / "stat").read_text().partition("\n")[0].split()[1:9]
        user, nice, system, idle, iowait, irq, softirq, steal = (*map(int, fields), *[0] * (8 - len(fields)))
        busy = user + nice + system + irq + softirq + steal
        everything = busy + idle + iowait
        percent = _percent(busy - self._busy, everything - self._all)
        self._busy, self._all = busy, everything
        return percent


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 1) if whole > 0 else 0.0
