"""Device and throughput monitors, by what a CSV file of the logger has in the end."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.models import Regression, loader, trainer
from trainyard.callbacks.device_stats_monitor import DeviceStatsMonitor
from trainyard.callbacks.throughput_monitor import ThroughputMonitor
from trainyard.errors import MisconfigurationException
from trainyard.loggers import CSVLogger
from trainyard.utilities.cpu_stats import CPUStats
from trainyard.utilities.throughput import Throughput, get_available_flops


class Net(Regression):
    def __init__(self, flops: float | None = None) -> None:
        super().__init__()
        if flops is not None:
            self.flops_per_batch = flops

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


def rows(folder: Path, key: str) -> list[dict[str, str]]:
    """Those of metrics.csv that have `key`."""
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        return [row for row in csv.DictReader(file) if row.get(key)]


def test_device_statistics_around_the_batches_that_are_logged(tmp_path: Path) -> None:
    fit = trainer(
        logger=CSVLogger(tmp_path),
        callbacks=[DeviceStatsMonitor()],
        log_every_n_steps=2,
        num_sanity_val_steps=0,
    )
    fit.fit(Net(), loader(24), loader(16))
    for moment, steps in (
        ("on_train_batch_start", ["1", "3", "5"]),
        ("on_train_batch_end", ["1", "3", "5"]),
        ("on_validation_batch_end", ["6", "6"]),
    ):
        found = rows(tmp_path, f"DeviceStatsMonitor.{moment}/cpu_vm_percent")
        assert [row["step"] for row in found] == steps
        for name in ("cpu_vm_percent", "cpu_percent", "cpu_swap_percent"):
            assert all(0 <= float(row[f"DeviceStatsMonitor.{moment}/{name}"]) <= 100 for row in found)


def test_device_statistics_need_a_logger() -> None:
    with pytest.raises(MisconfigurationException, match="logger=False"):
        trainer(callbacks=[DeviceStatsMonitor()]).fit(Net(), loader())


def test_proc_is_read_as_the_kernel_writes_it(tmp_path: Path) -> None:
    """proc(5): user nice system idle iowait irq softirq steal guest guest_nice."""
    (tmp_path / "meminfo").write_text(
        "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    250 kB\nSwapTotal:  200 kB\nSwapFree: 150 kB\n"
    )
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 0 100 700 100 0 0 0 0 0\ncpu0 1 2 3 4\n")
    stats = CPUStats(tmp_path)
    assert stats.read() == {"cpu_vm_percent": 75.0, "cpu_percent": 20.0, "cpu_swap_percent": 25.0}
    stat.write_text("cpu  130 0 110 750 100 0 0 10 30 0\ncpu0 1 2 3 4\n")
    assert stats.read()["cpu_percent"] == 50.0


def test_throughput_of_a_fit(tmp_path: Path) -> None:
    """A clock that goes on by a second each time that it is asked: batches between two looks took a second in all."""
    seconds = itertools.count()
    monitor = ThroughputMonitor(
        lambda batch: len(batch[0]), length_fn=lambda batch: batch[0].numel(), clock=lambda: float(next(seconds)),
        window_size=4, available_flops=1e4,
    )  # fmt: skip
    fit = trainer(logger=CSVLogger(tmp_path), callbacks=[monitor], log_every_n_steps=2, max_epochs=1)
    fit.fit(Net(flops=500.0), loader(24))
    found = rows(tmp_path, "train/time")
    assert [row["step"] for row in found] == ["1", "3", "5"]
    assert [float(row["train/batches"]) for row in found] == [2, 4, 6]
    assert [float(row["train/samples"]) for row in found] == [8, 16, 24]
    assert [float(row["train/lengths"]) for row in found] == [32, 64, 96]
    # Looked at after batches 1, 2, 4, 6; the window of the last begins at batch 2.
    assert [float(row["train/device/batches_per_sec"]) for row in found] == [1, 1.5, 2]
    assert [float(row["train/device/samples_per_sec"]) for row in found] == [4, 6, 8]
    assert [float(row["train/device/items_per_sec"]) for row in found] == [16, 24, 32]
    assert [float(row["train/device/flops_per_sec"]) for row in found] == [500, 750, 1000]
    assert [float(row["train/device/mfu"]) for row in found] == [0.05, 0.075, 0.1]
    assert "train/samples_per_sec" not in found[0]


def test_the_time_of_a_validation_is_not_that_of_the_training(tmp_path: Path) -> None:
    now = [0.0]

    class Slow(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            now[0] += 1.0
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            now[0] += 100.0

    monitor = ThroughputMonitor(lambda batch: len(batch[0]), clock=lambda: now[0])
    fit = trainer(logger=CSVLogger(tmp_path), callbacks=[monitor], log_every_n_steps=2, max_epochs=2)
    fit.fit(Slow(), loader(16), loader(16))
    assert [float(row["train/time"]) for row in rows(tmp_path, "train/time")] == [2, 4, 6, 8]
    assert [float(row["validate/time"]) for row in rows(tmp_path, "validate/time")] == [200, 400, 200, 400]
    fit.test(Examined(), loader(16), verbose=False)
    assert [float(row["test/batches"]) for row in rows(tmp_path, "test/time")] == [2, 4]


class Examined(Net):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))


def test_rates_of_all_devices() -> None:
    throughput = Throughput(world_size=4, separator=".")
    throughput.update(time=1.0, batches=1, samples=10)
    throughput.update(time=3.0, batches=5, samples=50)
    assert throughput.compute() == {
        "time": 3.0, "batches": 5, "samples": 50, "batches_per_sec": 8.0, "samples_per_sec": 80.0,
        "device.batches_per_sec": 2.0, "device.samples_per_sec": 20.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match="do not fall"):
        throughput.update(time=2.0, batches=6, samples=60)
    with pytest.raises(ValueError, match="window_size"):
        ThroughputMonitor(len, window_size=1)


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", False, 989.4e12),
        ("NVIDIA H100 PCIe", "16-true", False, 756e12),
        ("NVIDIA A100-SXM4-80GB", "32-true", True, 156e12),
        ("NVIDIA A100-SXM4-80GB", "32-true", False, 19.5e12),
        ("NVIDIA L40", "bf16-true", False, 181e12),
        ("Tesla T4", "16-mixed", False, 65e12),
        ("Tesla T4", "64-true", False, None),
        ("NVIDIA T400", "16-mixed", False, None),
    ],
)
def test_what_devices_can_do(name: str, precision: str, tf32: bool, peak: float | None) -> None:
    assert get_available_flops(name, precision, tf32=tf32) == peak


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")
def test_the_allocator_of_a_gpu(tmp_path: Path) -> None:
    fit = trainer(
        logger=CSVLogger(tmp_path), callbacks=[DeviceStatsMonitor()], log_every_n_steps=1, accelerator="gpu"
    )
    fit.fit(Net(), loader())
    key = "DeviceStatsMonitor.on_train_batch_end/allocated_bytes.all.current"
    assert all(float(row[key]) > 0 for row in rows(tmp_path, key))
