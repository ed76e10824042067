"""Killed in the middle: whatever was begun, `up` goes on with it and `down` leaves nothing of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from devcluster.cluster import Cluster, leftovers
from devcluster.gotools import build

ROOT = Path(__file__).parents[2]
NAME = "devtest-cut"


def interrupted_up(seconds: float, how: signal.Signals, *, group: bool) -> None:
    """Start `up`, and after some time send a signal as a terminal would (group) or to the program alone."""
    command = [sys.executable, "-m", "devcluster.cluster", "up", "--name", NAME]
    process = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    time.sleep(seconds)
    if group:
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    process.wait(timeout=60)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("seconds", [0.3, 0.6, 1, 1.5, 2.5, 4])
def test_down_after(seconds: float, how: signal.Signals) -> None:
    build.ensure()
    interrupted_up(seconds, how, group=how == signal.SIGINT)
    Cluster(NAME).down()
    assert leftovers() == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_up_after(how: signal.Signals) -> None:
    cluster = Cluster(NAME)
    try:
        for seconds in (0.4, 0.8, 1.2, 1.6):
            interrupted_up(seconds, how, group=True)
        cluster.up()
        assert cluster.status().healthy
        interrupted_down(0.2)
        interrupted_down(0.35)
    finally:
        cluster.down(purge=True)
    assert leftovers() == []


def interrupted_down(seconds: float) -> None:
    process = subprocess.Popen([sys.executable, "-m", "devcluster.cluster", "down", "--name", NAME], cwd=ROOT)
    time.sleep(seconds)
    process.kill()
    process.wait()
