"""Who a process is, what it would start, and ranks that are forked."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.trainer.forkhost import ROOT, Host
from tests.trainer.pods import free_port
from trainyard.environment import Place, SLURMEnvironment, first_host
from trainyard.errors import MisconfigurationException
from trainyard.strategies import launchers
from trainyard.strategies.launchers.command import own_command

TORCHRUN = {
    "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
    "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NNODES": "2",
    "SLURM_NODELIST": "gpu[003-007,12],login1", "SLURM_JOB_ID": "123456", "SLURM_SRUN_COMM_HOST": "10.0.0.9",
}  # fmt: skip


def test_place_of_torchrun_counts_whatever_was_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "trainyard"):
        place = launchers.place_for(
            "popen", 4, 2, {**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}
        )
        launchers.place_for("popen", 4, 2, {**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"})
        launchers.place_for("popen", 3, 2, TORCHRUN)
        launchers.place_for("popen", None, 1, {**TORCHRUN, "RANK": "0"})
    assert (place.world_size, place.nodes, place.launched, place.start) == (4, 2, True, None)
    [record] = caplog.records
    assert "asks for 8 processes; torchrun started 4, which is what counts" in record.getMessage()


def test_place_of_a_task_of_srun() -> None:
    place = Place.from_env(SRUN)
    assert place == Place(rank=5, local_rank=1, node_rank=1, world_size=8, local_world_size=4, launched=True)
    meeting = SLURMEnvironment().rendezvous(SRUN)
    assert (meeting["MASTER_ADDR"], meeting["MASTER_PORT"], meeting["RANK"]) == ("gpu003", "23456", "5")
    assert "MASTER_PORT" not in SLURMEnvironment().rendezvous({**SRUN, "MASTER_PORT": "1"})
    batch_script = {k: v for k, v in SRUN.items() if k != "SLURM_SRUN_COMM_HOST"}
    assert Place.from_env(batch_script) == Place()
    with pytest.raises(ValueError, match="SLURM_PROCID"):
        Place.from_env({**SRUN, "SLURM_PROCID": "five"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[1-3]", "n1"), ("gpu[003-007,12],l1", "gpu003"), ("r[01,2]-ib", "r01-ib"), ("", "")],
)  # fmt: skip
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_place_on_a_laptop(caplog: pytest.LogCaptureFixture) -> None:
    assert launchers.place_for(None, 4, 1, {}) == Place()
    assert launchers.place_for("popen", 1, 1, {}) == Place()
    assert launchers.place_for("popen", 2, 1, {}) == Place(world_size=2, local_world_size=2, start="popen")
    assert launchers.place_for("fork", 3, 1, {}) == Place(world_size=3, local_world_size=3, start="fork")
    with caplog.at_level(logging.WARNING, "trainyard"):
        alone = launchers.place_for("popen", 2, 3, {})
    assert alone == Place(world_size=2, local_world_size=2, start="popen")
    assert "num_nodes=3" in caplog.text


def test_place_on_nodes_that_are_started_by_hand() -> None:
    env = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "NODE_RANK": "1"}
    place = launchers.place_for("popen", 2, 3, env)
    assert place == Place(rank=2, node_rank=1, world_size=6, local_world_size=2, start="popen")
    with pytest.raises(ValueError, match="NODE_RANK: '3' is not a number from 0 to 2"):
        launchers.place_for("popen", 2, 3, {**env, "NODE_RANK": "3"})


@pytest.mark.parametrize(
    ("argv", "spec", "file", "expected"),
    [
        (["train.py", "--lr", "1"], None, "/work/train.py", ["/work/train.py", "--lr", "1"]),
        (["/x/pkg/__main__.py", "a"], "pkg.__main__", "/x/pkg/__main__.py", ["-m", "pkg", "a"]),
        (["/x/pkg/run.py"], "pkg.run", "/x/pkg/run.py", ["-m", "pkg.run"]),
        (["app.zip", "a"], "__main__", "app.zip/__main__.py", ["app.zip", "a"]),
    ],
)  # fmt: skip
def test_own_command(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], spec: str | None, file: str, expected: list[str]
) -> None:
    main = ModuleType("__main__")
    main.__file__ = file
    main.__spec__ = None if spec is None else type("Spec", (), {"name": spec})()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", argv)
    command = own_command()
    assert command[0] == sys.executable
    assert command[-len(expected) :] == expected


def test_notebook_is_told_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(MisconfigurationException, match="ddp_notebook"):
        own_command()


@pytest.mark.parametrize("how", ["by hand", "srun", "plugin"])
def test_two_nodes_without_torchrun(host: Host, unbroken: str, how: str) -> None:
    """One process each: of a script with num_nodes=2, of srun, and of an environment of the user's own."""
    port = str(free_port())
    script = str(ROOT / "tests/trainer/failing.py")
    ranks = []
    for node in "01":
        env = {
            "by hand": {"NODE_RANK": node, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            "srun": {
                **SRUN, "SLURM_PROCID": node, "SLURM_NTASKS": "2", "SLURM_NODEID": node, "SLURM_LOCALID": "0",
                "SLURM_NODELIST": "localhost", "MASTER_PORT": port,
            },
            "plugin": {"MINE": f"{node} 2 {port}"},
        }[how]  # fmt: skip
        what = "environment" if how == "plugin" else "nothing"
        ranks += host.start([script, what, "0", "ddp", "1"], env={**env, "FAILING_NODES": "2"})
    assert host.wait(ranks, 60) == [0, 0], "".join(r.output for r in ranks)[-4000:]
    assert f"steps 12 weights {unbroken}" in ranks[0].output
    assert "weights" not in ranks[1].output


# ---- ranks that are forked


@pytest.fixture(scope="module")
def forked(host: Host, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("fork")
    argv = [str(ROOT / "tests/trainer/launch_scenes.py"), str(folder / "found.json"), str(folder)]
    rank = host.run(argv, env={"TRAINYARD_GRACE_SECONDS": "60"}, seconds=120)[0]
    assert rank.code == 0, rank.output[-4000:]
    return json.loads((folder / "found.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def unbroken(host: Host) -> str:
    """Weights of the same fit on two ranks that were launched."""
    script = str(ROOT / "tests/trainer/failing.py")
    output = host.run([script, "nothing", "0"], world=2)[0].output
    return output.split("steps 12 weights ")[1][:64]


def test_what_is_left_of_forked_ranks(forked: dict[str, Any], unbroken: str) -> None:
    story = forked["story"]
    assert story["asked"] == [2, 0, 2]
    assert story["weights"] == unbroken
    assert (story["step"], story["epoch"], story["status"]) == (12, 2, "finished")
    assert {"loss", "val_loss"} <= set(story["metrics"])
    assert story["there"]
    assert story["best score"] == pytest.approx(story["val_loss"])
    assert story["children"] == []


def test_answers_of_forked_ranks(forked: dict[str, Any]) -> None:
    story = forked["story"]
    assert story["tested"] == [{"test_sum": pytest.approx(story["expected"], rel=1e-5)}]
    assert story["predicted"] == [[4, 1]]  # rank 0's share


def test_failures_of_forked_ranks(forked: dict[str, Any]) -> None:
    error = forked["exception"]
    assert error["kind"] == "ProcessRaisedException"
    assert error["said"].startswith("rank 1 failed: ValueError: no luck in validation_step")
    assert "in validation_step" in error["said"]
    assert "Traceback" in error["said"]
    killed = forked["SIGKILL"]
    assert (killed["kind"], killed["said"]) == (
        "ProcessExitedException",
        "rank 1's process was killed by SIGKILL",
    )
    assert error["children"] == killed["children"] == []


def test_sigterm_to_the_process_that_forked(forked: dict[str, Any], unbroken: str) -> None:
    stopped = forked["SIGTERM"]
    assert (stopped["kind"], stopped["code"], stopped["children"]) == ("SIGTERMException", 143, [])
    assert forked["resumed"] == unbroken


def test_nothing_is_started_before_an_entry_point(tmp_path: Path) -> None:
    import trainyard as L

    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", logger=False, default_root_dir=tmp_path,
        enable_progress_bar=False,
    )  # fmt: skip
    assert (trainer.place.start, trainer.world_size, trainer.is_global_zero) == ("fork", 2, True)
