"""How a script gets its processes.

For the Trainer, in its constructor, when the strategy's kind of launch is known (`Strategy.launch`), and around each
entry point:

    devices = launchers.asked_devices(accelerator, devices)
    self.place = strategy.place = launchers.place_for(strategy.launch, devices, num_nodes)

    @launchers.entry_point
    def fit(self, model, ...): ...

A process that torchrun, a TrainingRun or srun started has all its siblings: there `entry_point` does nothing. Else, with
more than one device:

- "popen": this process becomes rank 0 (of its node), and starts the other ranks by running its own command line again, at
  the first entry point. They come to the same entry point by themselves.
- "spawn", "fork": the processes are made by torch.multiprocessing for each entry point, and run nothing but that; what is
  left of them comes back to this process, which is no rank.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from trainyard.environment import Place, detect
from trainyard.strategies.launchers import popen
from trainyard.strategies.launchers.command import is_interactive

if TYPE_CHECKING:
    from trainyard.accelerators import Accelerator, Devices
    from trainyard.trainer.trainer import Trainer

__all__ = ["asked_devices", "entry_point", "is_interactive", "launch", "place_for"]

_log = logging.getLogger("trainyard")
_warned: set[str] = set()
_Method = TypeVar("_Method", bound=Callable[..., Any])


def asked_devices(accelerator: Accelerator, devices: Devices) -> int | None:
    """Processes of this node that `Trainer(devices=...)` asks for; None for as many as there are.

    Where a launcher has started the processes it is no error to ask for devices that are not here. Raises
    MisconfigurationException.
    """
    if not Place.from_env().launched:
        return len(accelerator.get_parallel_devices(accelerator.parse_devices(devices)))
    if isinstance(devices, list | tuple):
        return len(devices)
    text = str(devices).strip()
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    return int(text) if text.isdigit() else None


def place_for(
    launch: str | None, devices: int | None, num_nodes: int = 1, env: Mapping[str, str] = os.environ
) -> Place:
    """Who this process is, or is to be.

    `launch`: the strategy's kind; None for one that has no other processes. `devices`: see `asked_devices`. The
    environment's word counts: where the script asks for another number it is told so, once. Raises
    MisconfigurationException, ValueError (odd variables).
    """
    popen.adopt(env)
    place = Place.from_env(env)
    if place.launched:
        wanted = None if devices is None else devices * num_nodes
        if wanted not in (None, place.world_size) and place.rank == 0:
            started = detect(env)
            _warn_once(
                f"Trainer(devices={devices}, num_nodes={num_nodes}) asks for {wanted} processes; "
                f"{started.name if started else 'the environment'} started {place.world_size}, which is what counts"
            )
        return place
    local = devices or 1
    nodes = num_nodes if launch == "popen" and {"MASTER_ADDR", "NODE_RANK"} <= env.keys() else 1
    if nodes != num_nodes:
        _warn_once(
            f"Trainer(num_nodes={num_nodes}): nothing in the environment says where the other nodes are; this run uses "
            "this machine alone. Start it with torchrun, in a TrainingRun, or with MASTER_ADDR, MASTER_PORT and NODE_RANK"
        )
    if launch is None or local * nodes == 1:
        return Place()
    node = _node_rank(env, nodes) if nodes > 1 else 0
    return Place(
        rank=node * local, node_rank=node, world_size=local * nodes, local_world_size=local, start=launch
    )


def launch(trainer: Trainer, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `function`, a method of the trainer, returns: here, or on rank 0. Raises what it raises.

    From processes of "spawn" and "fork" comes torch.multiprocessing.ProcessRaisedException with the trace of the rank
    that is the cause.
    """
    if trainer.place.start in ("spawn", "fork"):
        from trainyard.strategies.launchers import multiprocess

        return multiprocess.launch(trainer, function.__name__, args, kwargs)
    if trainer.place.start == "popen":
        _settle(trainer, popen.start(trainer.place).place)
    elif (environment := detect()) is not None:
        os.environ.update(environment.rendezvous(os.environ))
    with popen.running():
        return function(*args, **kwargs)


def entry_point(method: _Method) -> _Method:
    """`launch` around a method of the Trainer; a call from within another entry point stays where it is."""

    @functools.wraps(method)
    def wrapped(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        return launch(trainer, functools.wraps(method)(functools.partial(method, trainer)), *args, **kwargs)

    return wrapped  # type: ignore[return-value]


def _settle(trainer: Trainer, place: Place) -> None:
    if place.world_size != trainer.place.world_size:
        _warn_once(
            f"this script runs with {place.world_size} processes since its first entry point; "
            f"a Trainer that asks for {trainer.place.world_size} uses those"
        )
    trainer.place = trainer.strategy.place = replace(place, start=None)


def _node_rank(env: Mapping[str, str], nodes: int) -> int:
    try:
        node = int(env["NODE_RANK"])
    except ValueError:
        node = -1
    if not 0 <= node < nodes:
        raise ValueError(f"NODE_RANK: {env['NODE_RANK']!r} is not a number from 0 to {nodes - 1}")
    return node


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        _log.warning("%s", text)
