"""accelerator="tpu", with the real torch_xla: its CPU device, in an environment of its own with the torch it was built for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from devcluster.venvs import environment
from tests.trainer import peer_ranks
from trainyard.accelerators import XLAAccelerator, make_accelerator
from trainyard.environment import Place
from trainyard.errors import MisconfigurationException
from trainyard.plugins import TorchSyncBatchNorm
from trainyard.plugins.precision import make_precision
from trainyard.strategies import SingleDeviceXLAStrategy, XLAStrategy, make_strategy
from trainyard.utilities.optional import has

SCRIPT = str(Path(__file__).with_name("xla_cases.py"))
without_it = pytest.mark.skipif(has("torch_xla"), reason="torch_xla is in this environment")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("xla")


class Runs:
    """Of a case, on the XLA device and on the CPU; by rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = environment("xla") / "bin" / "python"

    def xla(self, case: str, world: int = 1) -> list[Any]:
        return peer_ranks.run(self.python, SCRIPT, case, self.folder, world=world, PJRT_DEVICE="CPU")

    def cpu(self, case: str, world: int = 1) -> list[Any]:
        return peer_ranks.run(Path(sys.executable), SCRIPT, case, self.folder / "cpu", world=world)


@pytest.fixture(scope="module")
def runs(folder: Path) -> Runs:
    return Runs(folder)


@pytest.fixture(scope="module")
def one(runs: Runs) -> tuple[dict[str, Any], dict[str, Any]]:
    """One process on XLA, and one on the CPU."""
    (cpu,) = runs.cpu("runs")
    (runs.folder / "half-False.ckpt").symlink_to(runs.folder / "cpu" / "half-False.ckpt")
    return runs.xla("runs")[0], cpu


@pytest.fixture(scope="module")
def resumed(runs: Runs, one: Any) -> dict[str, Any]:
    return runs.xla("resumed")[0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def two(runs: Runs) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return runs.xla("two", 2), runs.cpu("two", 2)


def same(found: Any, wanted: Any, atol: float = 2e-6) -> None:
    torch.testing.assert_close(found, wanted, atol=atol, rtol=0)


def test_a_fit_is_that_of_the_cpu(one: Any) -> None:
    """Accumulation, clipping, a scheduler, a buffer, logged values, validation."""
    xla, cpu = one
    assert xla["whole"]["strategy"] == "single_xla"
    assert xla["whole"]["devices"] == {"xla"}
    assert cpu["whole"]["devices"] == {"cpu"}
    assert xla["whole"]["steps"] == cpu["whole"]["steps"] == 6
    same(xla["whole"]["weights"], cpu["whole"]["weights"])
    assert xla["whole"]["metrics"] == pytest.approx(cpu["whole"]["metrics"], abs=1e-5)


def test_manual_optimization_validation_and_prediction(one: Any) -> None:
    xla, cpu = one
    same(xla["manual"], cpu["manual"])
    same(xla["predicted"], cpu["predicted"])
    assert xla["validated"][0] == pytest.approx(cpu["validated"][0], abs=1e-5)


def test_bfloat16(one: Any) -> None:
    xla, _ = one
    same(xla["bf16"]["weights"], xla["half"]["weights"], 0.05)
    assert not torch.equal(xla["bf16"]["weights"]["net.0.weight"], xla["half"]["weights"]["net.0.weight"])
    assert xla["bf16"]["weights"]["net.0.weight"].dtype == torch.float32


def test_a_resume_goes_on_with_the_same_numbers(one: Any, resumed: dict[str, Any]) -> None:
    """Dropout too: the device's generator is in the checkpoint."""
    xla, _ = one
    same(resumed["resumed"]["weights"], xla["whole"]["weights"], 0)
    same(resumed["dropout"]["weights"], xla["dropout"]["weights"], 0)
    assert not torch.equal(xla["dropout"]["weights"]["net.0.weight"], xla["whole"]["weights"]["net.0.weight"])


def test_checkpoints_go_both_ways(runs: Runs, one: Any, resumed: dict[str, Any]) -> None:
    """A file of the CPU's goes on here; one from here is read where there is no torch_xla, and holds tensors of the CPU."""
    _, cpu = one
    same(resumed["from the other"]["weights"], cpu["whole"]["weights"])
    checkpoint = torch.load(runs.folder / "half-True.ckpt", weights_only=True)
    assert checkpoint["state_dict"]["net.0.weight"].device.type == "cpu"
    assert checkpoint["optimizer_states"][0]["state"][0]["momentum_buffer"].device.type == "cpu"


def test_two_processes_train_what_ddp_trains(two: Any) -> None:
    xla, cpu = two
    assert [run["whole"]["strategy"] for run in (*xla, *cpu)] == ["xla", "xla", "ddp", "ddp"]
    for mine, theirs in zip(xla, cpu, strict=True):
        same(mine["whole"]["weights"], theirs["whole"]["weights"])
        same(mine["resumed"]["weights"], theirs["resumed"]["weights"])
        assert mine["resumed"]["metrics"] == pytest.approx(theirs["resumed"]["metrics"], abs=1e-5)
        assert mine["resumed"]["steps"] == 6
    same(xla[0]["resumed"]["weights"]["net.0.weight"], xla[1]["resumed"]["weights"]["net.0.weight"], 0)


def test_processes_start_from_the_weights_of_the_first(two: Any) -> None:
    xla, cpu = two
    same(xla[0]["synchronised"], xla[1]["synchronised"], 0)
    same(xla[0]["synchronised"], cpu[0]["synchronised"])


def test_what_processes_say_to_one_another(two: Any) -> None:
    xla, cpu = two
    for mine, theirs in zip(xla, cpu, strict=True):
        for key in ("reduced", "gathered", "gradient"):
            same(mine[key], theirs[key], 0)
        assert mine["broadcast"] == {"rank": 0}


# ---- without torch_xla


@without_it
@pytest.mark.parametrize("name", ["tpu", "TPU"])
def test_without_the_package_it_says_what_to_install(name: str) -> None:
    with pytest.raises(
        MisconfigurationException, match=rf"'{name}' needs PyTorch/XLA: pip install 'torch_xla\[tpu\]'"
    ):
        make_accelerator(name)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainyard.accelerators.xla.has", lambda name: True)
    monkeypatch.delenv("PJRT_DEVICE", raising=False)


@pytest.mark.usefixtures("installed")
def test_without_a_tpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MisconfigurationException, match=r"finds no TPU.*PJRT_DEVICE"):
        make_accelerator("tpu")
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    assert isinstance(make_accelerator("tpu"), XLAAccelerator)
    assert (
        make_accelerator("auto").name() == "cpu"
    )  # what stands in for a TPU is taken when it is asked for only
    assert XLAAccelerator.auto_device_count() == 1
    assert XLAAccelerator.parse_devices(2) == [0, 1]
    assert [str(device) for device in XLAAccelerator.get_parallel_devices([0, 1])] == ["xla:0", "xla:1"]


@pytest.mark.usefixtures("installed")
def test_auto_takes_a_tpu_and_its_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainyard.accelerators.xla._has_device_files", lambda: True)
    accelerator = make_accelerator("auto")
    assert accelerator.name() == "tpu"
    assert isinstance(make_strategy("auto", Place(), accelerator), SingleDeviceXLAStrategy)
    several = Place(world_size=4, local_world_size=4, launched=True)
    assert isinstance(make_strategy("auto", several, accelerator), XLAStrategy)


@pytest.mark.parametrize(
    ("name", "kind", "debug"),
    [("xla", XLAStrategy, False), ("xla_debug", XLAStrategy, True), ("single_xla", SingleDeviceXLAStrategy, False),
     ("single_tpu", SingleDeviceXLAStrategy, False)],
)  # fmt: skip
def test_names(name: str, kind: type[Any], debug: bool) -> None:
    made = make_strategy(name, Place(), XLAAccelerator())
    assert type(made) is kind
    assert made.debug is debug  # type: ignore[attr-defined]
    assert made.launch == ("popen" if kind is XLAStrategy else None)


def test_what_does_not_go_together_is_named() -> None:
    with pytest.raises(MisconfigurationException, match="'xla' is for accelerator='tpu', not 'cpu'"):
        make_strategy("xla", Place(), "cpu").connect()
    with pytest.raises(MisconfigurationException, match="'ddp' does not run on accelerator='tpu'"):
        make_strategy("ddp", Place(), XLAAccelerator())
    several = make_strategy("xla", Place(world_size=2, local_world_size=2, launched=True), XLAAccelerator())
    several.layer_sync = TorchSyncBatchNorm()
    with pytest.raises(MisconfigurationException, match="sync_batchnorm"):
        several.setup(torch.nn.Linear(1, 1), training=True)  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match="device: 1"):
        SingleDeviceXLAStrategy(device=1)
    strategy = make_strategy("single_xla", Place(), XLAAccelerator())
    strategy.precision = make_precision("16-mixed")
    with pytest.raises(MisconfigurationException, match="'bf16-mixed'"):
        strategy.connect()
