"""One process of `./dev bench checkpoint`. Runs in the environment of locks/savers.txt, with Trainyard on its path.

python -m tests.bench.checkpoint_cases stall '{"case": "torch.save to a file", "bytes": 67108864, ...}'
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench import checkpoint_states as states
from tests.bench.checkpoint_savers import Places, Saver, use_saver

_BOUND = 900.0
"""Seconds for one save to be done."""
_STEP_SECONDS = 0.02


class Steps:
    """Stands for the training: products of matrices in one thread, 20 to 40 ms each."""

    def __init__(self) -> None:
        import torch

        self._matrix = torch.ones(256, 256) / 256
        self._products = 1
        # The least of some: what else the machine does only makes a step longer.
        while min(self.take() for _ in range(3)) < _STEP_SECONDS and self._products < 1 << 16:
            self._products *= 2
        self.usual = sorted(self.take() for _ in range(15))[7]

    def take(self) -> float:
        """Seconds of one step."""
        import torch

        begin = time.perf_counter()
        for _ in range(self._products):
            torch.mm(self._matrix, self._matrix)
        return time.perf_counter() - begin

    def until(self, done: Callable[[], bool]) -> float:
        """Train until `done`; how much longer these steps took than usual. Raises TimeoutError."""
        end = time.perf_counter() + _BOUND
        longer = 0.0
        while not done():
            longer += self.take() - self.usual
            if time.perf_counter() > end:
                raise TimeoutError(f"a save was not done after {_BOUND:g} s")
        return longer


def places(settings: dict[str, Any], case: str = "") -> Places:
    name = re.sub(r"\W+", "-", case) or "all"
    folder = Path(settings["folder"]) / name
    folder.mkdir(parents=True, exist_ok=True)
    return Places(folder=folder, prefix=f"{settings['prefix']}/{name}", memory=Path(settings["memory"]))


def settle() -> None:
    """What the last save wrote goes to the disk now, not during the next: in a training, minutes lie between them."""
    os.sync()


# ---- saves


def stall(settings: dict[str, Any]) -> dict[str, Any]:
    """By case, of the first save and of those after it, in seconds: `stall`, that the training thread stood still; `slower`,
    that its steps took longer while the save was under way; `whole`, until the save was where it should be."""
    import torch

    torch.set_num_threads(1)
    state = states.make(settings["bytes"])
    steps = Steps()
    found: dict[str, list[dict[str, float]]] = {}
    for case in settings["cases"]:
        saves = found[case] = []

        def use(saver: Saver) -> None:
            for number in range(1 + settings["warm"]):
                saver.rest()
                settle()
                begin = time.perf_counter()
                saver.save(number)
                stood = time.perf_counter() - begin
                longer = steps.until(saver.done)
                whole = time.perf_counter() - begin
                saves.append({"stall": stood, "slower": longer, "whole": whole})  # noqa: B023
                saver.clean(number)

        use_saver(case, state, places(settings, case), use)
    return {"bytes": state.nbytes, "tensors": len(state.tensors), "step": steps.usual, "saves": found}


def memory(settings: dict[str, Any]) -> dict[str, Any]:
    """By case, bytes that a first and a second save take beside the state: see `checkpoint_memory`."""
    import torch

    from tests.bench.checkpoint_memory import Watch

    torch.set_num_threads(1)
    state = states.make(settings["bytes"])
    watch = Watch()
    found: dict[str, Any] = {}
    for case in settings["cases"]:
        saves: list[dict[str, Any]] = []

        def use(saver: Saver) -> None:
            for number in range(2):
                saver.rest()
                with watch.during() as most:
                    saver.save(number)
                    end = time.monotonic() + _BOUND
                    while not saver.done():
                        if time.monotonic() > end:
                            raise TimeoutError(f"a save was not done after {_BOUND:g} s")
                        time.sleep(0.01)
                saves.append(most["most"])  # noqa: B023
                saver.clean(number)

        with watch.during() as before:
            pass
        use_saver(case, state, places(settings, case), use)
        found[case] = {"before": before["before"], "saves": saves}
    watch.close()
    return {"bytes": state.nbytes, "memory": found}


# ---- what all of this runs in


def main(argv: list[str]) -> int:
    from tests.bench import checkpoint_loads, checkpoint_runs, checkpoint_transfer

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    what = {
        "stall": stall,
        "memory": memory,
        "transfer": checkpoint_transfer.transfer,
        "write": checkpoint_loads.write,
        "load": checkpoint_loads.load,
        "train": checkpoint_runs.train,
        "resume": checkpoint_runs.resume,
    }[argv[0]]
    with contextlib.redirect_stdout(sys.stderr):
        found = what(json.loads(argv[1]))
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(found), flush=True)
    sys.stdout.flush()
    os._exit(0)  # what libraries leave running is none of our business


if __name__ == "__main__":
    main(sys.argv[1:])
