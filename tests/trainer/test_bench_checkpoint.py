"""`./dev bench checkpoint --quick`: everything is measured once, and becomes a page. No figure is judged here."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from devcluster.errors import DevclusterError
from tests.bench import checkpoint, checkpoint_docs, main
from tests.bench.checkpoint_loads import LOADS
from tests.bench.checkpoint_savers import CASES, OURS_IN_A_RUN, YARDSTICK
from tests.bench.checkpoint_states import MIB


@pytest.mark.timeout(1200)
def test_a_quick_run_measures_everything_and_becomes_a_page(tmp_path: Path) -> None:
    args = argparse.Namespace(sizes=None, quick=True, trials=1)
    result = {"what": "checkpoint", **main.where(), **checkpoint.measure(args)}
    result = json.loads(json.dumps(result))
    (found,) = result["sizes"].values()
    assert 1.9 * MIB < found["bytes"] < 2.1 * MIB
    for key in ("first_stall_ms", *checkpoint_docs.TABLES):
        assert set(found[key]) == {*CASES, OURS_IN_A_RUN}
        assert all(s["trials"] == 1 for s in found[key].values())
    for direction in ("upload", "download"):
        moved = found["transfer"][direction]
        assert len(moved["mib_per_second"]) == 3 and len(moved["ours_over"]) == 2
    assert set(found["load_seconds"]) == set(LOADS)
    restarts = found["resume_seconds"]
    assert restarts["2 ranks, fsdp, from this node"]["read"].keys() == {"local"}
    assert restarts["2 ranks, fsdp, from S3"]["read"].keys() == {"store"}
    assert set(found["memory"]["load"]) == set(LOADS)
    assert YARDSTICK in found["memory"]["save"]
    page = checkpoint_docs.render(checkpoint_docs.PAGE.read_text(encoding="utf-8"), result, "x.json")
    assert "| upload: at least 80% of" in page
    assert checkpoint.table(result)
    checkpoint_docs.plot(result, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_sizes_are_in_mebibytes_or_gibibytes() -> None:
    assert checkpoint.sizes("64M,1G") == [64 * MIB, 1024 * MIB]
    with pytest.raises(DevclusterError, match="1T"):
        checkpoint.sizes("64M,1T")
