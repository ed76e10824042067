"""Configuration, messages, and that none of it costs an import of torch."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from trainyard.checkpoint import staging
from trainyard.checkpoint.config import CheckpointConfig
from trainyard.checkpoint.errors import (
    CheckpointMismatch,
    StoreConfigError,
    StoreUnavailable,
    exit_code,
    from_wire,
    to_wire,
)
from trainyard.checkpoint.messages import Outcome, Staged, from_line
from trainyard.checkpoint.retry import with_retries
from trainyard.checkpoint.staging import StagingFolder
from trainyard_api.checkpoints import Cursor, Fenced, Record

ROOT = Path(__file__).resolve().parents[2]


def test_the_uploader_and_the_agents_client_do_not_import_torch() -> None:
    code = (
        "import sys, trainyard, trainyard.checkpoint.uploader, trainyard.checkpoint.engine, trainyard.checkpoint.resume, "
        "trainyard.checkpoint.store_s3, trainyard.elastic.client\n"
        "print([m for m in ('torch', 'numpy', 'boto3') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True,
        env={"PYTHONPATH": f"{ROOT / 'operator'}:{ROOT / 'trainer-image'}"},
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_config_from_the_environment_of_a_training_run() -> None:
    config = CheckpointConfig.from_env({
        "TRAINYARD_CHECKPOINT_URI": "s3://bucket/some/where", "TRAINYARD_CHECKPOINT_ENDPOINT": "http://10.0.0.1:7070",
        "TRAINYARD_CHECKPOINT_EVERY_STEPS": "50", "TRAINYARD_CHECKPOINT_EVERY_SECONDS": "30",
        "TRAINYARD_CHECKPOINT_KEEP": "5", "TRAINYARD_RUN_UID": "0b1c", "TRAINYARD_ATTEMPT": "4",
    })  # fmt: skip
    assert config is not None
    assert (config.every_n_steps, config.every_n_seconds, config.keep) == (50, 30.0, 5)
    assert (config.run_id, config.attempt) == ("0b1c", 4)
    assert CheckpointConfig.from_env({}) is None


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"uri": "bucket/prefix"}, "checkpoint.uri"),
        ({"uri": "file://relative"}, "checkpoint.uri"),
        ({"uri": "s3://b", "every_n_steps": 0}, "checkpoint.every_n_steps"),
        ({"uri": "s3://b", "every_n_seconds": -1}, "checkpoint.every_n_seconds"),
        ({"uri": "s3://b", "keep": 1}, "checkpoint.keep"),
        ({"uri": "s3://b", "run": "../other"}, "checkpoint.run"),
    ],
)
def test_a_bad_configuration_names_the_field(arguments: dict[str, object], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        CheckpointConfig(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="TRAINYARD_CHECKPOINT_KEEP"):
        CheckpointConfig.from_env({"TRAINYARD_CHECKPOINT_URI": "s3://b", "TRAINYARD_CHECKPOINT_KEEP": "many"})


def test_exit_codes_and_errors_travel_between_ranks() -> None:
    for error, code in (
        (StoreConfigError("no bucket"), 78), (CheckpointMismatch("shape"), 78), (StoreUnavailable("down"), 1),
        (Fenced("late"), 79), (RuntimeError("x"), 1),
    ):  # fmt: skip
        assert exit_code(error) == code
        if not isinstance(error, RuntimeError):
            twin = from_wire(to_wire(error))
            assert (type(twin), str(twin)) == (type(error), str(error))


def test_messages_survive_the_wire() -> None:
    head = Record(
        kind="commit",
        seq=0,
        run="r",
        attempt=2,
        step=9,
        time=1.5,
        world_size=2,
        cursor=Cursor(epoch=1, samples=7, seed=3),
    )
    staged = Staged(attempt=2, step=9, rank=0, world=2, path="/s/x.safetensors", size=3, record=head)
    assert Staged.from_message(from_line(staged.line())) == staged
    outcome = Outcome(
        op="committed", attempt=2, step=9, seq=17, uri="s3://b/r/commits/00000017.json", time=2.0
    )
    assert Outcome.from_message(from_line(outcome.line())) == outcome
    for bad in (b"", b"[]", b'{"step": 1}', b"{"):
        with pytest.raises(ValueError, match=r".+"):
            from_line(bad)


def test_retries_end_at_the_bound_and_stop_for_other_errors() -> None:
    tries = []

    def down() -> None:
        tries.append(1)
        raise StoreUnavailable("down")

    with pytest.raises(StoreUnavailable):
        with_retries(down, seconds=0.3, first=0.02)
    assert len(tries) > 2

    def refused() -> None:
        tries.append(1)
        raise StoreConfigError("no")

    tries.clear()
    with pytest.raises(StoreConfigError):
        with_retries(refused, seconds=5)
    assert len(tries) == 1


def test_a_killed_process_s_staging_folder_is_swept_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(staging, "_YOUNG_SECONDS", 0)
    left = tmp_path / "trainyard-staging-left"
    (left / "data").mkdir(parents=True)
    first = StagingFolder({})
    assert not left.exists()
    second = StagingFolder({})
    assert first.path.exists(), "its owner lives"
    for folder in (first, second):
        folder.close()
    assert list(tmp_path.iterdir()) == []
    pod = StagingFolder({"TRAINYARD_RUNTIME_DIR": str(tmp_path)})
    pod.close()
    assert pod.path == tmp_path / "staging"
    assert pod.path.exists(), "the uploader still needs it"
