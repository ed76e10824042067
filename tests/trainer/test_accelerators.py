"""`accelerator` and `devices`: what is taken, what is refused and with which words."""

from __future__ import annotations

import pytest
import torch

from trainyard.accelerators import (
    Accelerator,
    CPUAccelerator,
    CUDAAccelerator,
    MPSAccelerator,
    auto_device_count,
    find_usable_cuda_devices,
    make_accelerator,
)
from trainyard.accelerators.parse import device_indices
from trainyard.errors import MisconfigurationException

no_gpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has a GPU")


@pytest.mark.parametrize(
    ("devices", "wanted"),
    [(2, [0, 1]), ("2", [0, 1]), ("auto", [0, 1, 2, 3]), (-1, [0, 1, 2, 3]), ("-1", [0, 1, 2, 3]), ([3, 1], [3, 1]),
     ("0,1", [0, 1]), ("2,", [2]), (" 1 , 3 ", [1, 3]), ((0, 2), [0, 2])],
)  # fmt: skip
def test_devices_of_a_machine_with_four(devices: object, wanted: list[int]) -> None:
    assert device_indices(devices, available=4, kind="CUDA") == wanted  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("devices", "said"),
    [(5, "asks for 5; torch sees 4 CUDA devices"), (0, "selects none"), ("0", "selects none"), ([], "selects none"),
     ([0, 4], "names 4"), ([-2], "names -2"), (-2, "selects none"), ("0,0", "names a device twice"),
     ("two", "is not a count"), ("", "is not a count"), (True, "is not a count"), ([0, True], "is not a count"),
     (1.5, "is not a count"), (None, "is not a count"), ("1;2", "is not a count")],
)  # fmt: skip
def test_devices_that_a_machine_with_four_has_not(devices: object, said: str) -> None:
    with pytest.raises(MisconfigurationException, match="devices: ") as error:
        device_indices(devices, available=4, kind="CUDA")  # type: ignore[arg-type]
    assert said in str(error.value)


def test_one_device_is_said_in_the_singular() -> None:
    with pytest.raises(MisconfigurationException, match="torch sees 1 MPS device here"):
        MPSAccelerator.parse_devices(2)


@pytest.mark.parametrize(("devices", "wanted"), [(3, 3), ("2", 2), ("auto", 1)])
def test_processes_on_the_cpu(devices: int | str, wanted: int) -> None:
    assert CPUAccelerator.parse_devices(devices) == wanted
    assert CPUAccelerator.get_parallel_devices(devices) == [torch.device("cpu")] * wanted


@pytest.mark.parametrize("devices", [0, -1, [0, 1], "0,1", "-1", "many"])
def test_processes_on_the_cpu_are_a_count(devices: object) -> None:
    with pytest.raises(MisconfigurationException, match="devices: "):
        CPUAccelerator.parse_devices(devices)  # type: ignore[arg-type]


@no_gpu
def test_auto_without_a_gpu_is_the_cpu() -> None:
    assert isinstance(make_accelerator("auto"), CPUAccelerator)
    assert auto_device_count() == 1
    assert not CUDAAccelerator.is_available()
    assert find_usable_cuda_devices() == []


@no_gpu
@pytest.mark.parametrize("name", ["gpu", "cuda", "mps", "GPU"])
def test_a_gpu_that_is_not_there(name: str) -> None:
    with pytest.raises(
        MisconfigurationException, match=rf"accelerator: '{name}', but torch sees n.* device here"
    ):
        make_accelerator(name)
    with pytest.raises(MisconfigurationException, match="num_devices: 1 asked for, 0 of the 0"):
        find_usable_cuda_devices(1)


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"accelerator: 'cudo' is none of .*did you mean 'cuda'"
    ):
        make_accelerator("cudo")


def test_an_instance_is_taken_as_it_is() -> None:
    given = CPUAccelerator()
    assert make_accelerator(given) is given


def test_asking_does_not_start_cuda() -> None:
    """After that, ddp_fork could not use it."""
    make_accelerator("auto")
    assert not torch.cuda.is_initialized()


def test_stats_of_the_cpu_are_shares_of_it() -> None:
    stats = CPUAccelerator().get_device_stats(torch.device("cpu"))
    assert set(stats) == {"cpu_percent", "cpu_vm_percent", "cpu_swap_percent"}
    assert 0 < stats["cpu_vm_percent"] < 100


@pytest.mark.parametrize("kind", [CPUAccelerator, CUDAAccelerator, MPSAccelerator])
def test_names_are_those_the_trainer_takes(kind: type[Accelerator]) -> None:
    assert kind.name() == kind.device_type == kind().name()
