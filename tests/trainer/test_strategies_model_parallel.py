"""Modules that shard themselves over a mesh of data- and tensor-parallel ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.trainer import strategy_cases as cases
from tests.trainer.forkhost import Host
from tests.trainer.strategy_ranks import whole_run
from tests.trainer.test_strategies import close, run_case


def test_two_ranks_share_layers_or_batches(host: Host, tmp_path: Path) -> None:
    wanted = whole_run("single_device", clip=(0.1, "norm"))
    zero, one = run_case(host, tmp_path, "model_parallel", 2)
    for sizes in ("1x2", "2x1"):
        close(zero[sizes], wanted)
        close(zero[sizes]["again"], zero[sizes], atol=0)
        assert zero[sizes]["losses"] == one[sizes]["losses"]
        assert (zero[sizes]["shard"], one[sizes]["shard"]) == ((4, 7), (3, 7))
    wrong_size, not_parallel = zero["errors"]
    assert "data_parallel_size: 3 x tensor_parallel_size 1 is not the number of processes, 2" in wrong_size
    assert "no parameter is distributed; apply parallelize_module or fully_shard" in not_parallel


def test_a_mesh_of_two_by_two(host: Host, tmp_path: Path) -> None:
    found = run_case(host, tmp_path, "model_parallel", 4)
    close(found[0]["2x2"], whole_run("single_device", clip=(0.1, "norm")))
    assert {rank["2x2"]["shard"] for rank in found} == {(2, 7), (1, 7)}


def test_the_trainer_hands_out_the_mesh(host: Host, tmp_path: Path) -> None:
    wanted = cases.fit("single_device", tmp_path, batch_size=8, manual=True, epochs=1)
    zero, one = run_case(host, tmp_path, "parallel_fit", 2)
    assert list(zero["file"]["state_dict"]) == list(wanted["model"])
    for name, value in wanted["model"].items():
        torch.testing.assert_close(zero["file"]["state_dict"][name], value, atol=2e-6, rtol=0)
    assert zero["logged"] == one["logged"] == pytest.approx(wanted["logged"], abs=1e-6)
