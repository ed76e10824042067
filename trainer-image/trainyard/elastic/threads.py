"""Thread counts of the numeric libraries, after a fork from a process that imported them with one thread."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

_OPENBLAS_SETTERS = (
    "openblas_set_num_threads",
    "openblas_set_num_threads64_",
    "scipy_openblas_set_num_threads",
    "scipy_openblas_set_num_threads64_",
)


def default_omp(env: MutableMapping[str, str], procs: int) -> None:
    """As torchrun: one OpenMP thread per process when there are several and the user said nothing."""
    if procs > 1:
        env.setdefault("OMP_NUM_THREADS", "1")


def wanted(env: MutableMapping[str, str], name: str) -> int | None:
    """The positive number in the variable `name` (the first of a list), if there is one."""
    first = env.get(name, "").split(",")[0].strip()
    return int(first) if first.isdigit() and int(first) > 0 else None


def apply(env: MutableMapping[str, str]) -> None:
    """Gives torch and OpenBLAS the counts that they would have read from `env` in a fresh process.

    They read it when they are loaded, which was in the zygote, with 1.
    """
    cores = len(os.sched_getaffinity(0))
    omp = wanted(env, "OMP_NUM_THREADS")
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(omp or cores)
    blas = wanted(env, "OPENBLAS_NUM_THREADS") or omp or cores
    for path in _loaded("openblas"):
        with suppress(OSError):
            library = ctypes.CDLL(path)
            for setter in _OPENBLAS_SETTERS:
                with suppress(AttributeError):
                    getattr(library, setter)(ctypes.c_int(blas))


def _loaded(part: str) -> set[str]:
    """Paths of shared libraries of this process whose file name has `part` in it."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    return {p for p in paths if p.startswith("/") and part in Path(p).name}
