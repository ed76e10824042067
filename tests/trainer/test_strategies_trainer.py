"""The Trainer's switches: strategy, precision, sync_batchnorm, plugins; and the loops on sharded modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer import strategy_cases as cases
from tests.trainer.forkhost import Host
from tests.trainer.test_strategies import run_case
from trainyard.accelerators import CPUAccelerator
from trainyard.errors import MisconfigurationException


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], atol: float = 2e-6) -> None:
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def fits(host: Host, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_case(host, tmp_path_factory.mktemp("fits"), "fits", 2)


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return cases.fit("single_device", tmp_path_factory.mktemp("wanted"), batch_size=8)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_fit_is_that_of_one_process(
    fits: list[dict[str, Any]], wanted: dict[str, Any], strategy: str
) -> None:
    """Accumulation, clipping, an uneven last batch, validation within; then test and predict; hooks see the same."""
    for rank in fits:
        found = rank[strategy]
        same(found["model"], wanted["model"])
        assert found["logged"] == pytest.approx(wanted["logged"], abs=1e-6)
        assert found["test"] == pytest.approx(wanted["test"], abs=1e-6)
        assert found["kind"] == "Learner"
    together = sorted(value for rank in fits for value in rank[strategy]["predicted"])
    assert together == pytest.approx(sorted(wanted["predicted"]), abs=1e-6)


def test_files_of_all_strategies_are_the_same(fits: list[dict[str, Any]], wanted: dict[str, Any]) -> None:
    """One process goes on from what two have saved, sharded or not, and the other way round."""
    for name in ("ddp", "fsdp"):
        file = fits[0][name]["file"]
        same(file["state_dict"], wanted["file"]["state_dict"])
        assert file["optimizer_states"][0].keys() == wanted["file"]["optimizer_states"][0].keys()
        for index, state in wanted["file"]["optimizer_states"][0]["state"].items():
            for key, value in state.items():
                torch.testing.assert_close(
                    file["optimizer_states"][0]["state"][index][key], value, atol=2e-6, rtol=0
                )
        gone_on = cases.fit("single_device", Path(fits[0][name]["folder"]), batch_size=8, go_on=True)
        same(gone_on["model"], fits[0][f"{name} gone on"]["model"])


def test_manual_optimization_on_shards(fits: list[dict[str, Any]], tmp_path: Path) -> None:
    wanted = cases.fit("single_device", tmp_path, batch_size=8, manual=True, epochs=1)
    for rank in fits:
        same(rank["fsdp manual"]["model"], wanted["model"])
        same(rank["ddp manual"]["model"], wanted["model"])


def test_batch_normalisation_by_one_switch(fits: list[dict[str, Any]], tmp_path: Path) -> None:
    wanted = cases.fit("single_device", tmp_path, batch_size=8, batch_norm=True, epochs=1)
    for name in ("ddp norm", "fsdp norm"):
        same(fits[0][name]["model"], wanted["model"], atol=1e-5)
        assert fits[0][name]["norm"] == "BatchNorm1d"


@pytest.mark.parametrize(
    "precision", ["64-true", "bf16-mixed", "16-mixed", "16-true", "bf16-true", 16, "bf16"]
)
def test_every_precision_fits_and_goes_on(precision: Any, tmp_path: Path) -> None:
    """From the file of its middle a run goes on to the same bits, the scaler among them."""
    whole = cases.fit("single_device", tmp_path / "whole", batch_size=8, precision=precision, epochs=2)
    cases.fit("single_device", tmp_path, batch_size=8, precision=precision, epochs=1)
    again = cases.fit("single_device", tmp_path, batch_size=8, precision=precision, epochs=2, go_on=True)
    same(again["model"], whole["model"], atol=0)
    dtype = {"64-true": torch.float64, "16-true": torch.float16, "bf16-true": torch.bfloat16}
    assert again["model"]["net.0.weight"].dtype == dtype.get(precision, torch.float32)
    assert ("MixedPrecision" in again["file"]) == (precision in ("16-mixed", 16))
    assert again["file"].get("MixedPrecision") == whole["file"].get("MixedPrecision")
    assert all(value.isfinite().all() for value in again["model"].values())


def test_two_precisions_are_one_too_many() -> None:
    from trainyard.plugins import MixedPrecision

    with pytest.raises(MisconfigurationException, match=r"precision and plugins\[0\]"):
        cases.trainer(precision=32, plugins=[MixedPrecision("bf16-mixed")])
    assert cases.trainer(plugins=MixedPrecision("bf16-mixed")).precision == "bf16-mixed"


def test_an_accelerator_that_is_not_there() -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(
        MisconfigurationException, match="accelerator: 'gpu', but torch sees neither CUDA nor MPS"
    ):
        cases.trainer(accelerator="gpu")


def test_an_optimizer_of_parameters_that_are_gone(host: Host, tmp_path: Path) -> None:
    for rank in run_case(host, tmp_path, "early_optimizer", 2):
        assert "configure_optimizers: optimizer 0 (SGD) has parameters that the module has no more" in rank


def test_modules_made_in_the_trainers_context() -> None:
    made = cases.trainer(precision="64-true")
    assert isinstance(made.accelerator, CPUAccelerator)
    with made.init_module():
        assert torch.nn.Linear(2, 2).weight.dtype == torch.float64
    before = torch.get_rng_state()
    with made.init_module(empty_init=True):
        torch.nn.Linear(64, 64)
    assert torch.equal(before, torch.get_rng_state())
    with cases.trainer(strategy="fsdp").init_module(empty_init=True):
        assert torch.nn.Linear(2, 2).weight.is_meta
