"""A process that loads what it should not: `malicious_victim.py CASES RESULTS`, both files of JSON lines.

A case is [name, "run" or "file", place]. The process may take 1 GiB of address space more than it has when it begins.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

from tests.trainer.malicious_runs import RUN
from trainyard.checkpoint.config import CheckpointConfig
from trainyard.checkpoint.loading import whole
from trainyard.checkpoint.resume import Resumption
from trainyard.checkpoint.stores import open_store
from trainyard.peers import Alone
from trainyard.trainer import ckpt_file

ROOM = 1 << 30


def resume(folder: Path) -> dict[str, Any]:
    config = CheckpointConfig(uri=folder.as_uri(), run=RUN)
    resumption = Resumption(open_store(config), config, Alone(), folder.with_suffix(".staging"))
    resumption.open()
    loaded = resumption.load(whole)
    if loaded is None:
        return {"step": None}
    weight = loaded.state.main["state_dict"]["net.weight"]
    return {"step": loaded.record.step, "sum": float(weight.sum()), "fell_back": loaded.fell_back}


def attempt(verb: str, place: Path) -> dict[str, Any]:
    try:
        return resume(place) if verb == "run" else {"keys": sorted(ckpt_file.read(place))}
    except Exception as error:
        return {
            "error": type(error).__name__,
            "said": str(error),
            "family": [c.__name__ for c in type(error).__mro__],
        }


def peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    attempt("file", Path("/nowhere"))  # what is imported on the way
    (kilobytes,) = [
        int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if "VmSize" in line
    ]
    limit = kilobytes * 1024 + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with Path(sys.argv[2]).open("w") as results:
        for line in Path(sys.argv[1]).read_text().splitlines():
            name, verb, place = json.loads(line)
            os.environ["CANARY"] = f"{place}.canary"
            before = peak()
            found = attempt(verb, Path(place))
            found |= {"name": name, "grown": peak() - before, "canary": Path(f"{place}.canary").exists()}
            results.write(json.dumps(found) + "\n")
            results.flush()


if __name__ == "__main__":
    main()
