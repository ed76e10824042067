"""Ranks made by torch.multiprocessing ("spawn", "fork") for one entry point, on this machine.

They are given the Trainer and the arguments, and run the entry point as if torchrun had started them. What is left of rank
0 is brought back to the Trainer of this process: weights, metrics, states of callbacks, and what the entry point
returned. If a rank fails, all end, and the one that is the cause is named.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from trainyard.environment import Place
from trainyard.errors import MisconfigurationException
from trainyard.failure import ending
from trainyard.failure.cause import Cause, is_echo
from trainyard.failure.errors import SIGTERM_CODE, SIGTERMException
from trainyard.strategies.launchers import outcome
from trainyard_agent.prctl import die_with_parent

if TYPE_CHECKING:
    from trainyard.trainer.trainer import Trainer

_FAILED_WAIT = 7.0
"""How long the others may take to end when one has failed; they have their own bounds, which are shorter."""


@dataclass(frozen=True)
class _Job:
    """What all ranks are given."""

    trainer: Trainer
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    folder: Path
    """For what they leave."""
    port: int
    parent: int
    forked: bool


def launch(trainer: Trainer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the method `name` returned on rank 0. Raises torch.multiprocessing.ProcessRaisedException,
    ProcessExitedException, SIGTERMException."""
    method = str(trainer.place.start)
    _check(method)
    context: Any = multiprocessing.get_context(method)
    with tempfile.TemporaryDirectory(prefix="trainyard-ranks-") as path, _listen() as meeting:
        port, folder = meeting.getsockname()[1], Path(path)
        job = _Job(trainer, name, args, kwargs, folder, port, os.getpid(), forked=method == "fork")
        ranks = [
            context.Process(target=_be_rank, name=f"rank{rank}", args=(job, rank))
            for rank in range(trainer.place.world_size)
        ]
        sys.stdout.flush()
        sys.stderr.flush()
        with _ended(ranks), _sigterm_goes_to(ranks):
            for rank in ranks:
                rank.start()
            store = _serve(meeting)
            _await(ranks)
            del store
        _raise_failure(ranks, folder)
        return outcome.take_over(trainer, args, kwargs, folder)


def _check(method: str) -> None:
    """Raises MisconfigurationException where the ranks could not be started."""
    import torch

    if method == "fork" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise MisconfigurationException(
            "strategy: processes cannot be forked once CUDA is in use; do not touch the GPU before, or use 'ddp_spawn'"
        )
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise MisconfigurationException(
            "strategy: 'ddp_spawn' imports the script in each process, and the script calls the Trainer again there; put "
            "what is to be run once under `if __name__ == '__main__':`"
        )


# ---- in this process


def _await(ranks: list[Any]) -> None:
    """Until all have ended; not for long once one has failed."""
    end: float | None = None
    while alive := [r for r in ranks if r.exitcode is None]:
        wait([r.sentinel for r in alive], None if end is None else max(0.0, end - time.monotonic()))
        for rank in ranks:
            rank.join(0)
        if end is None and any(r.exitcode for r in ranks):
            end = time.monotonic() + _FAILED_WAIT
        elif end is not None and time.monotonic() >= end:
            return


@contextlib.contextmanager
def _ended(ranks: list[Any]) -> Iterator[None]:
    """Nobody is left behind."""
    try:
        yield
    except KeyboardInterrupt:
        # From a terminal they have had it too; else they need to be told.
        _signal(ranks, signal.SIGINT)
        wait_until = time.monotonic() + _FAILED_WAIT
        for rank in ranks:
            if rank.pid is not None:
                rank.join(max(0.0, wait_until - time.monotonic()))
        raise
    finally:
        for rank in ranks:
            if rank.pid is not None and rank.exitcode is None:
                rank.kill()
                rank.join()


@contextlib.contextmanager
def _sigterm_goes_to(ranks: list[Any]) -> Iterator[None]:
    """They agree on where to stop; this process ends when they have."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    parent = os.getpid()

    def forward(number: int, frame: Any) -> None:
        if os.getpid() == parent:
            _signal(ranks, signal.SIGTERM)
        if callable(before):
            before(number, frame)

    before = signal.signal(signal.SIGTERM, forward)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def _signal(ranks: list[Any], number: int) -> None:
    for rank in ranks:
        if rank.pid is not None and rank.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, number)


def _raise_failure(ranks: list[Any], folder: Path) -> None:
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

    failed = {number: rank for number, rank in enumerate(ranks) if rank.exitcode != 0}
    if not failed:
        return
    reports = sorted(
        filter(None, (_read_report(folder, n) for n in failed)), key=lambda r: (r["echo"], r["time"])
    )
    killed = {n: -r.exitcode for n, r in failed.items() if r.exitcode is not None and r.exitcode < 0}
    if reports and (not reports[0]["echo"] or not killed):
        cause = Cause(**reports[0]["cause"])
        if cause.code == SIGTERM_CODE:
            raise SIGTERMException(cause.message)
        text = f"{cause}\n\n{cause.trace}"
        raise ProcessRaisedException(text, cause.rank, failed[cause.rank].pid or -1)
    number, rank = next((n, failed[n]) for n in (*killed, *failed))
    name = signal.Signals(killed[number]).name if number in killed else None
    how = f"was killed by {name}" if name else f"exited with code {rank.exitcode}"
    raise ProcessExitedException(
        f"rank {number}'s process {how}", number, rank.pid or -1, rank.exitcode or 0, signal_name=name
    )


def _read_report(folder: Path, rank: int) -> dict[str, Any] | None:
    try:
        return json.loads(_report_file(folder, rank).read_text())  # type: ignore[no-any-return]
    except (OSError, ValueError):
        return None


def _listen() -> socket.socket:
    """Where the ranks meet. A socket that listens already, so that nobody can take its port."""
    meeting = socket.socket()
    meeting.bind(("127.0.0.1", 0))
    meeting.listen(128)
    return meeting


def _serve(meeting: socket.socket) -> Any:
    """The store behind it. Only when all ranks are forked: a thread of its would be missing in them, with its locks held."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    port = meeting.getsockname()[1]
    return TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=meeting.detach()
    )


# ---- in a rank


def _be_rank(job: _Job, rank: int) -> NoReturn:
    code, trainer = 0, job.trainer
    world = trainer.place.world_size
    try:
        die_with_parent(job.parent)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fork has the parent's handler
        _set_variables(rank, world, job.port)
        _be_alone(job)
        trainer.place = trainer.strategy.place = Place(
            rank=rank, local_rank=rank, world_size=world, local_world_size=world, launched=True
        )
        answer = getattr(trainer, job.name)(*job.args, **job.kwargs)
        if rank == 0:
            outcome.leave(trainer, answer, job.folder)
    except BaseException as error:
        code = _report(error, rank, job.folder)
    if code:
        ending.bound_interpreter_exit(ending.EXIT_SECONDS, code)
    sys.exit(code)


def _report(error: BaseException, rank: int, folder: Path) -> int:
    code = SIGTERM_CODE if isinstance(error, SIGTERMException) else 1
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        code = error.code
    if code:
        report = {
            "cause": {**json.loads(Cause.of(error, rank, code).to_json())},
            "echo": is_echo(error) or bool(getattr(error, "__notes__", [])), "time": time.time(),
        }  # fmt: skip
        draft = folder / f"draft-{rank}"
        draft.write_text(json.dumps(report))
        draft.replace(_report_file(folder, rank))
    return code


def _report_file(folder: Path, rank: int) -> Path:
    return folder / f"error-{rank}.json"


def _set_variables(rank: int, world: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )  # fmt: skip


def _be_alone(job: _Job) -> None:
    """Nothing of the model is shared with the other ranks: torch.multiprocessing puts tensors into shared memory."""
    import torch

    threads = max(1, len(os.sched_getaffinity(0)) // job.trainer.place.world_size)
    # The parent's pool of threads was not forked with it, and OpenMP would wait for it for ever.
    torch.set_num_threads(1 if job.forked else threads)
    given = (*job.args, *job.kwargs.values(), job.trainer.model)
    with torch.no_grad():
        for module in {id(m): m for m in given if isinstance(m, torch.nn.Module)}.values():
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.device.type == "cpu" and tensor.is_shared():  # type: ignore[no-untyped-call]
                    tensor.set_(tensor.clone())  # type: ignore[call-overload]
