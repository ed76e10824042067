"""What checkpoints cost, ours beside torch.save, torch.distributed.checkpoint and Lightning: stalls, bytes per second,
memory, and how soon a run goes on.

All of it on this machine, with a real S3 server (versitygw) on its disk. Each case is a process of its own; cases take turns,
so that whatever else the machine does falls on all of them. The packages are those of locks/savers.txt.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devcluster.errors import DevclusterError
from devcluster.progress import say, step, wait_for
from tests.bench.checkpoint_loads import LOADS
from tests.bench.checkpoint_savers import BUCKET, CASES, OURS_IN_A_RUN, YARDSTICK
from tests.bench.checkpoint_states import MIB
from tests.bench.checkpoint_transfer import OURS
from tests.bench.main import CHECKOUT, spread

SIZES = "64M,256M,1G,4G"
_BOUND = 1800.0
_TMPFS = Path("/dev/shm")  # noqa: S108 - a folder of our own is made in it
_MEMORY_AT_MOST = 1 << 30
"""Bytes of the state with which memory is watched: one size tells, and a look at a large process takes long."""
_RESUMES = ((1, "auto"), (2, "ddp"), (2, "fsdp"))
_TWO_RANKS_AT_MOST = 1 << 30
"""Bytes: two ranks have the state twice, with ddp."""
RESUMED_FROM = ("this node", "S3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How often what is done, for one size."""

    rounds: int
    """Processes of each case."""
    warm: int
    """Saves of each, beside the first."""
    transfers: int
    resumes: int


_QUICK = Plan(rounds=1, warm=1, transfers=1, resumes=1)


def plan(nbytes: int, trials: int) -> Plan:
    """With `trials` = 20 as many as docs/performance.md has."""

    def some(count: int) -> int:
        return max(1, round(count * trials / 20))

    if nbytes <= 512 * MIB:
        return Plan(rounds=some(4), warm=3, transfers=some(9), resumes=some(3))
    if nbytes <= 2048 * MIB:
        return Plan(rounds=some(3), warm=3, transfers=some(7), resumes=some(3))
    return Plan(rounds=some(2), warm=2, transfers=some(5), resumes=some(2))


def sizes(text: str) -> list[int]:
    """Bytes: "64M,1G". Raises DevclusterError."""
    found = []
    for word in text.split(","):
        match = re.fullmatch(r"(\d+)([MG])", word.strip())
        if match is None:
            raise DevclusterError(f"--sizes: {word!r} is no size like 64M or 1G")
        found.append(int(match[1]) * (MIB if match[2] == "M" else 1024 * MIB))
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All of it, in one run."""
    from devcluster.s3 import S3Server
    from devcluster.venvs import environment

    python = environment("savers") / "bin" / "python"
    wanted = sizes(args.sizes or ("2M" if args.quick else SIZES))
    found: dict[str, Any] = {}
    with _folder(None) as work, _folder(_TMPFS) as memory, S3Server(work / "s3") as server:
        server.make_bucket(BUCKET)
        bench = _Bench(python, work, memory, server.environment, server.data_dir)
        watched = max((n for n in wanted if n <= _MEMORY_AT_MOST), default=min(wanted))
        for nbytes in wanted:
            found[str(nbytes)] = _one_size(bench, nbytes, args, watch=nbytes == watched)
        with step("a run at the automatic interval"):
            automatic = bench.run("train", {"bytes": watched, "seconds": 3 if args.quick else 180})
    return {
        "versions": _versions(python),
        "sizes": found,
        "automatic": {"bytes": watched, **_share(automatic)},
        "shape": "GPT-like model with AdamW's moments, float32, on the CPU, one thread; versitygw on this machine's disk",
    }


def _one_size(bench: _Bench, nbytes: int, args: argparse.Namespace, *, watch: bool) -> dict[str, Any]:
    todo = _QUICK if args.quick else plan(nbytes, args.trials)
    name = label(nbytes)
    with step(f"{name}: {len(CASES) + 1} ways to save, {todo.rounds} rounds"):
        rounds = [_saves(bench, nbytes, todo, together=args.quick) for _ in range(todo.rounds)]
    with step(f"{name}: uploads and downloads, {todo.transfers} rounds"):
        moved = bench.run("transfer", {"bytes": nbytes, "rounds": todo.transfers})
    with step(f"{name}: loads"):
        loads, load_memory = _loads(bench, rounds[0]["bytes"], todo.resumes, watch=watch, together=args.quick)
    with step(f"{name}: restarts"):
        restarts = _restarts(bench, nbytes, todo.resumes, quick=args.quick)
    memory: dict[str, Any] = {}
    if watch:
        with step(f"{name}: memory"):
            memory = {"save": _memory(bench, nbytes, together=args.quick), "load": load_memory}
    return {
        "bytes": rounds[0]["bytes"],
        "tensors": rounds[0]["tensors"],
        **saves(rounds),
        "transfer": transfers(moved),
        "load_seconds": loads,
        "resume_seconds": restarts,
        "memory": memory,
        "interval": interval(rounds),
    }


# ---- what is run


class _Bench:
    """Runs processes of `checkpoint_cases`, each with a folder and a prefix of its own, which are deleted after it."""

    def __init__(self, python: Path, work: Path, memory: Path, s3: dict[str, str], data: Path) -> None:
        self._python, self._work, self._memory, self._data = python, work, memory, data
        paths = (CHECKOUT, CHECKOUT / "trainer-image", CHECKOUT / "operator")
        self._env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("TRAINYARD_", "AWS_"))},
            **s3,
            "PYTHONPATH": ":".join(map(str, paths)),
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(work),
        }
        self._number = 0

    @contextlib.contextmanager
    def place(self) -> Iterator[dict[str, Any]]:
        """Settings that say where; what is there goes with the block."""
        self._number += 1
        folder, prefix = self._work / f"case-{self._number}", f"case-{self._number}"
        folder.mkdir()
        try:
            yield {"folder": str(folder), "prefix": prefix, "memory": str(self._memory)}
        finally:
            # The server keeps an object in a file of its name: to delete it there is as good as by a thousand requests.
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(self._data / BUCKET / prefix, ignore_errors=True)

    @contextlib.contextmanager
    def pod(self, place: dict[str, Any], *, run: str) -> Iterator[dict[str, str]]:
        """Environment of a worker that has what an agent gives it: a folder that stays, and an uploader that keeps the newest
        checkpoint there. `run`: the name under `place`'s prefix, of which the uploader is. Raises DevclusterError."""
        folder = Path(place["folder"])
        env = {"TRAINYARD_RUNTIME_DIR": f"{folder}/pod", "TRAINYARD_UPLOADER_SOCKET": f"{folder}/u.sock"}
        mine = {
            "TRAINYARD_CHECKPOINT_URI": f"s3://{BUCKET}/{place['prefix']}/all", "TRAINYARD_RUN_UID": run,
            "TRAINYARD_CHECKPOINT_LOCAL": "1",
        }  # fmt: skip
        arguments = ["--socket", env["TRAINYARD_UPLOADER_SOCKET"], "--staging", f"{folder}/pod/staging"]
        uploader = subprocess.Popen(
            [str(self._python), "-m", "trainyard.checkpoint.uploader", *arguments], env={**self._env, **env, **mine},
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            wait_for(
                "waiting for the uploader",
                lambda: Path(env["TRAINYARD_UPLOADER_SOCKET"]).exists(),
                seconds=60,
                alive=lambda: uploader.poll() is None,
            )
            yield env
        finally:
            uploader.terminate()
            uploader.wait(60)

    def run(
        self, what: str, settings: dict[str, Any], *, at: dict[str, Any] | None = None, ranks: int = 1,
        env: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Its JSON. Raises DevclusterError."""
        if at is None:
            with self.place() as place:
                return self.run(what, settings, at=place, ranks=ranks, env=env)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [
            str(self._python), *(launcher if ranks > 1 else []), "-m", "tests.bench.checkpoint_cases", what,
            json.dumps({**settings, **at}),
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, cwd=CHECKOUT, env={**self._env, **(env or {})}, capture_output=True, text=True, check=False,
                timeout=_BOUND,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise DevclusterError(f"{what} {settings} took more than {_BOUND:g} s") from error
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            raise DevclusterError(f"{what} {settings} failed ({done.returncode}):\n{done.stderr[-3000:]}")
        return json.loads(lines[-1])  # type: ignore[no-any-return]


def _saves(bench: _Bench, nbytes: int, todo: Plan, *, together: bool) -> dict[str, Any]:
    """One round: all cases, a process each."""
    settings = {"bytes": nbytes, "warm": todo.warm}
    found: dict[str, Any] = {}
    for cases in [CASES] if together else [[case] for case in CASES]:
        one = bench.run("stall", {**settings, "cases": list(cases)})
        found.setdefault("saves", {}).update(one["saves"])
        found.update(bytes=one["bytes"], tensors=one["tensors"])
    found["saves"][OURS_IN_A_RUN] = bench.run("train", settings)["saves"]
    return found


def _memory(bench: _Bench, nbytes: int, *, together: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for cases in [CASES[:2]] if together else [[case] for case in CASES]:
        found.update(bench.run("memory", {"bytes": nbytes, "cases": list(cases)})["memory"])
    return {case: save_memory(looks) for case, looks in found.items()}


def _loads(
    bench: _Bench, nbytes: int, rounds: int, *, watch: bool, together: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(seconds, memory), by case. What is loaded was written shortly before: it comes from the kernel's cache."""
    seconds: dict[str, list[float]] = {case: [] for case in LOADS}
    memory: dict[str, Any] = {}
    savers = list(dict.fromkeys(LOADS.values()))
    # Two of ours would stage the same step of the same attempt on this node.
    for chosen in [savers[:1], savers[1:]] if together else [[saver] for saver in savers]:
        with bench.place() as place:
            env = {"TRAINYARD_RUNTIME_DIR": f"{place['folder']}/pod"}
            bench.run("write", {"bytes": nbytes, "cases": chosen}, at=place, env=env)
            cases = [case for case in LOADS if LOADS[case] in chosen]
            groups = [cases] if together else [[case] for case in cases]
            for number in range(rounds + int(watch)):
                looking = number == rounds
                for group in groups:
                    settings = {"bytes": nbytes, "cases": group, "watch": looking}
                    found = bench.run("load", settings, at=place, env=env)
                    if looking:
                        memory.update(found["memory"])
                        continue
                    for case in group:
                        seconds[case].append(found["seconds"][case])
    return (
        {case: spread(values) for case, values in seconds.items()},
        # DCP loads into a state that was made before.
        {c: load_memory(looks, 0 if c.startswith("DCP") else nbytes) for c, looks in memory.items()},
    )


def _restarts(bench: _Bench, nbytes: int, rounds: int, *, quick: bool) -> dict[str, Any]:
    """Of whole runs: seconds of the engine, and from `fit` to its first batch."""
    found: dict[str, Any] = {}
    for ranks, strategy in _RESUMES:
        if (ranks > 1 and nbytes > _TWO_RANKS_AT_MOST) or (quick and strategy != "fsdp"):
            continue
        who = "1 process" if ranks == 1 else f"{ranks} ranks, {strategy}"
        settings = {"bytes": nbytes, "ranks": ranks, "strategy": strategy}
        several: dict[str, list[dict[str, Any]]] = {source: [] for source in RESUMED_FROM}
        with bench.place() as place, bench.pod(place, run="resume") as pod:
            fresh = {**settings, "fresh": True, "local": True, "attempt": 1}
            bench.run("resume", fresh, at=place, ranks=ranks, env=pod)
            # What is on the node counts as long as nobody else has written to the log: so those come first.
            for number in range(2 * rounds):
                source = RESUMED_FROM[number // rounds]
                one = bench.run(
                    "resume", {**settings, "fresh": False, "local": source != "S3", "attempt": 2 + number}, at=place, ranks=ranks,
                    env=pod if source != "S3" else None,
                )  # fmt: skip
                if not one["right"]:
                    raise DevclusterError(f"{who}, from {source}: went on with other weights than were saved")
                several[source].append(one)
        for source in RESUMED_FROM:
            ones = several[source]
            found[f"{who}, from {source}"] = {
                "engine": spread([one["times"]["open"] + one["times"]["load"] for one in ones]),
                "first batch": spread([one["times"]["first batch"] for one in ones]),
                "read": _read(ones),
            }
    return found


def _read(ones: list[dict[str, Any]]) -> dict[str, int]:
    """MiB by source, of all ranks together, of one restart."""
    found: dict[str, int] = {}
    for rank in ones[-1]["read"]:
        for source, count in rank.items():
            found[source] = found.get(source, 0) + count
    return {source: round(count / MIB) for source, count in found.items()}


# ---- what it comes to


def saves(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds, by case."""
    by_case: dict[str, list[list[dict[str, float]]]] = {}
    for found in rounds:
        for case, several in found["saves"].items():
            by_case.setdefault(case, []).append(several)
    copies = [_usual(several) for several in by_case[YARDSTICK]]
    return {
        "first_stall_ms": {c: _ms([s[0]["stall"] for s in r]) for c, r in by_case.items()},
        "stall_ms": {c: _ms([w["stall"] for s in r for w in s[1:]]) for c, r in by_case.items()},
        "stall_over_the_copy_ms": {
            c: _ms([w["stall"] - copy for s, copy in zip(r, copies, strict=True) for w in s[1:]])
            for c, r in by_case.items()
        },
        "slower_ms": {c: _ms([w["slower"] for s in r for w in s[1:]]) for c, r in by_case.items()},
        "whole_ms": {c: _ms([w["whole"] for s in r for w in s[1:]]) for c, r in by_case.items()},
    }  # fmt: skip


def _usual(several: list[dict[str, float]]) -> float:
    return statistics.median(save["stall"] for save in several[1:])


def _ms(seconds: list[float]) -> dict[str, Any]:
    return spread([s * 1e3 for s in seconds])


def transfers(moved: dict[str, Any]) -> dict[str, Any]:
    """MiB/s by direction and way, and ours as a share of the others' of the same round."""
    return {
        "part": moved["part"],
        "workers": moved["workers"],
        **{
            direction: {
                "mib_per_second": {
                    way: spread([moved["bytes"] / MIB / s for s in seconds])
                    for way, seconds in ways.items()
                },
                "ours_over": {
                    way: spread([bare / mine for bare, mine in zip(seconds, ways[OURS], strict=True)])
                    for way, seconds in ways.items()
                    if way != OURS
                },
            }
            for direction, ways in moved["seconds"].items()
        },
    }  # fmt: skip


def save_memory(looks: dict[str, Any]) -> dict[str, float]:
    """MiB at most during two saves, over what there was before the first."""
    before, several = looks["before"], looks["saves"]
    return {
        f"{who} {kind}": round((max(s[who][kind] for s in several) - before[who][kind]) / MIB, 1)
        for who in ("process", "children")
        for kind in ("anon", "file")
    }


def load_memory(look: dict[str, Any], nbytes: int) -> dict[str, float]:
    """MiB at most during a load: in all, and over the `nbytes` that are for what was loaded."""
    before, most = look["before"], look["most"]
    taken = sum(most[who]["anon"] - before[who]["anon"] for who in ("process", "children"))
    return {"anon": round(taken / MIB, 1), "over the state": round((taken - nbytes) / MIB, 1)}


def interval(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """What `every: auto` makes of these stalls in a run that has lived an hour without a failure."""
    from trainyard.checkpoint.interval import Life, choose

    several = [save for found in rounds for save in found["saves"][OURS_IN_A_RUN][1:]]
    stall = statistics.median(s["stall"] for s in several)
    whole = statistics.median(s["whole"] for s in several)
    chosen = choose(stall=stall, commit=whole - stall, mttf=Life(seconds=3600.0).mttf)
    return {
        "stall_seconds": round(stall, 4),
        "interval_seconds": round(chosen.seconds, 1),
        "share": round(stall / chosen.seconds, 6),
    }


def _share(run: dict[str, Any]) -> dict[str, Any]:
    return {**run, "share": round(sum(run["stalls"]) / run["seconds"], 6)}


# ---- for people


def label(nbytes: int) -> str:
    mib = round(int(nbytes) / MIB)
    return f"{mib} MiB" if mib < 1024 else f"{mib / 1024:g} GiB"


def table(result: dict[str, Any]) -> str:
    """Medians, with least and most."""
    from tests.bench.checkpoint_docs import TABLES

    lines = []
    for nbytes, found in result["sizes"].items():
        for key, title in TABLES.items():
            lines.append(f"{label(nbytes)}: {title:<52} median     min     max")
            lines += [
                f"  {n:<58} {_n(s['p50'])} {_n(s['min'])} {_n(s['max'])}" for n, s in found[key].items()
            ]
        for direction in ("upload", "download"):
            for way, s in found["transfer"][direction]["ours_over"].items():
                lines.append(
                    f"{label(nbytes)}: {direction}, ours over {way:<33} {_n(s['p50'])} {_n(s['min'])} {_n(s['max'])}"
                )
        lines += [
            f"{label(nbytes)}: resume, {who:<45} {_n(s['engine']['p50'])} s, first batch after "
            f"{_n(s['first batch']['p50'])} s, MiB read {s['read']}"
            for who, s in found["resume_seconds"].items()
        ]
        lines.append(f"{label(nbytes)}: at the automatic interval {found['interval']}")
        for what, cases in found["memory"].items():
            lines += [f"{label(nbytes)}: MiB at most, {what}, {case:<45} {m}" for case, m in cases.items()]
    lines.append(f"automatic: {result['automatic']}")
    return "\n".join(lines)


def report(result: dict[str, Any], out: Path) -> None:
    """Beside the JSON file: the picture."""
    from tests.bench.checkpoint_docs import plot

    path = out / f"{result['date'][:10]}-{result['commit'][:7]}-checkpoint.png"
    plot(result, path)
    say(f"drawn to {path}")


def _n(value: float) -> str:
    return f"{value:>7.2f}" if abs(value) < 10 else f"{value:>7.0f}"


@contextlib.contextmanager
def _folder(parent: Path | None) -> Iterator[Path]:
    """A temporary one; in the usual place where `parent` cannot be written."""
    usable = parent if parent is not None and os.access(parent, os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="trainyard-bench-", dir=usable))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _versions(python: Path) -> dict[str, str]:
    code = (
        "import json; from importlib.metadata import version\n"
        "print(json.dumps({n: version(n) for n in ('torch', 'lightning', 'boto3', 's3fs')}))"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)  # type: ignore[no-any-return]
