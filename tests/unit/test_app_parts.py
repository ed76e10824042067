"""Starting: the CRD check, parts that end, the command line, and kopf's settings."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import kopf
import pytest

from tests.fakes.api import FakeApi
from tests.fakes.clock import FakeClock, settle
from trainyard_operator.cli import main
from trainyard_operator.crd import API_SECONDS, NoCrdError, check_crd
from trainyard_operator.kopf_host import KopfHost, NoDiffBase, NoProgress, kopf_settings
from trainyard_operator.kube.api import CRDS, ApiError, Object
from trainyard_operator.parts import PartEndedError, Parts

DOWN = ApiError(0, "ConnectionFailed", "refused")


def crd(*versions: str) -> Object:
    served = [{"name": v, "served": True} for v in versions]
    return {"metadata": {"name": "trainingruns.trainyard.dev"}, "spec": {"versions": served}}


async def test_the_crd_is_there() -> None:
    api = FakeApi()
    api.seed(CRDS, crd("v1alpha1", "v1"))
    await check_crd(api, FakeClock())


async def test_without_the_crd_it_says_how_to_install_it() -> None:
    with pytest.raises(NoCrdError, match="kubectl apply --server-side -f crds/"):
        await check_crd(FakeApi(), FakeClock())


async def test_a_crd_of_another_version_is_not_enough() -> None:
    api = FakeApi()
    api.seed(CRDS, crd("v2"))
    with pytest.raises(NoCrdError, match="serves v2, this operator needs v1alpha1"):
        await check_crd(api, FakeClock())


async def test_it_waits_for_an_api_server_that_is_not_up_but_not_for_ever() -> None:
    api, clock = FakeApi(), FakeClock()
    api.seed(CRDS, crd("v1alpha1"))
    api.fail_next("get", DOWN, times=5)
    task = asyncio.create_task(check_crd(api, clock))
    await clock.advance(4.5)
    assert not task.done()
    await clock.advance(1)
    assert task.done() and task.exception() is None
    api.fail_next("get", DOWN, times=10**6)
    task = asyncio.create_task(check_crd(api, clock))
    await clock.advance(API_SECONDS + 2)
    assert task.done() and isinstance(task.exception(), ApiError)


async def test_a_missing_right_is_told_at_once() -> None:
    api = FakeApi()
    api.fail_next("get", ApiError(403, "Forbidden", "no"))
    with pytest.raises(ApiError, match="Forbidden"):
        await check_crd(api, FakeClock())


async def forever() -> None:
    await asyncio.Event().wait()


async def raising(error: Exception) -> None:
    await asyncio.sleep(0)
    raise error


async def test_a_part_that_fails_ends_the_step_and_is_named() -> None:
    parts = Parts()
    parts.spawn("good", forever())
    parts.spawn("watch of pods", raising(ValueError("boom")))
    with pytest.raises(PartEndedError, match="watch of pods ended by itself") as caught:
        await parts.guard(forever())
    assert isinstance(caught.value.__cause__, ValueError)
    await parts.end()


async def test_a_part_that_just_returns_is_a_failure_too() -> None:
    parts = Parts()
    parts.spawn("events", asyncio.sleep(0))
    with pytest.raises(PartEndedError, match="events"):
        await parts.guard(forever())


async def test_a_step_is_awaited_and_its_error_is_its_own() -> None:
    parts = Parts()
    part = parts.spawn("good", forever())
    await parts.guard(asyncio.sleep(0))
    with pytest.raises(ValueError, match="mine"):
        await parts.guard(raising(ValueError("mine")))
    await settle()
    assert not part.done()
    other = asyncio.create_task(forever())
    await parts.end([other])
    assert part.cancelled() and other.cancelled()


# ---- the command line -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["run", "--workers", "0"], "--workers: 0 is not between"),
        (["run", "--nonsense"], "nonsense"),
        (["dance"], "dance"),
    ],
)
def test_wrong_arguments_end_with_2(args: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    assert text in capsys.readouterr().err


def test_a_missing_certificate_ends_with_2_and_names_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trainyard_operator", "run", "--coordinator-cert", str(tmp_path / "no.crt")],
        env={"PYTHONPATH": "operator", "PATH": "", "TRAINYARD_LOG_FORMAT": "text"},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "TRAINYARD_COORDINATOR_CERT" in done.stderr and "Traceback" not in done.stderr


def test_help_and_version_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", "--help"])
    text = capsys.readouterr().out
    assert "TRAINYARD_COORDINATOR_URL" in text and "Exit codes" in text
    main(["version"])
    assert capsys.readouterr().out.strip()


# ---- kopf -------------------------------------------------------------------------------------------


def test_kopf_is_set_to_write_nothing() -> None:
    settings = kopf_settings()
    assert settings.scanning.disabled and settings.peering.standalone and not settings.posting.enabled
    assert isinstance(settings.persistence.diffbase_storage, NoDiffBase)
    assert isinstance(settings.persistence.progress_storage, NoProgress)
    patch, body = kopf.Patch(), kopf.Body({"metadata": {"name": "x"}})
    diffbase, progress = settings.persistence.diffbase_storage, settings.persistence.progress_storage
    diffbase.store(body=body, patch=patch, essence=diffbase.build(body=body))
    progress.touch(body=body, patch=patch, value="x")
    key: Any = "handler"
    progress.store(key=key, record={}, body=body, patch=patch)  # type: ignore[typeddict-item]
    assert dict(patch) == {} and progress.fetch(key=key, body=body) is None


async def test_a_kopf_that_cannot_log_in_is_started_again_and_stops_at_once() -> None:
    tries: list[int] = []

    async def connect() -> Any:
        tries.append(1)
        raise OSError("no route to host")

    host = KopfHost(connect=connect, namespaces=["ns"], ring=lambda namespace, name: None)
    assert host.alive() == "" and await host.stop() is None, "before it was started"
    host = KopfHost(connect=connect, namespaces=["ns"], ring=lambda namespace, name: None)
    host.start()
    async with asyncio.timeout(20):
        while host.starts < 2:  # noqa: ASYNC110 - it lives in another thread
            await asyncio.sleep(0.02)
    assert host.alive() == "" and tries
    await host.stop()
    assert not host._thread.is_alive()
