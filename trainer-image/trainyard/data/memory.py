"""What objects of the user's remember from epoch to epoch: generators and counters.

A sampler that seeds itself by an epoch that it counts, or that has a generator of its own, gives another order after a
restart unless it gets these back. `state_dict` methods of samplers are not used for that: they say where in an epoch a
sampler is, and here samplers are always run from the epoch's start.
"""

from __future__ import annotations

import random
from typing import Any

_PRIMITIVES = (bool, int, float, str, type(None))
_DEPTH = 4


class Memory:
    """Of `roots`, and of the samplers that they hold. What never changes (sizes, ranks) is not in it, so that it can be
    given to objects that were made for another world size."""

    def __init__(self, *roots: Any) -> None:
        self._objects: dict[str, Any] = {}
        for number, root in enumerate(roots):
            self._find(root, str(number), _DEPTH)
        self._at_first = {path: _attributes(found) for path, found in self._objects.items()}

    def _find(self, found: Any, path: str, depth: int) -> None:
        from torch.utils.data import Sampler

        if found is None or any(found is known for known in self._objects.values()):
            return
        self._objects[path] = found
        if depth and not _is_generator(found):
            for name, value in getattr(found, "__dict__", {}).items():
                if _is_generator(value) or isinstance(value, Sampler):
                    self._find(value, f"{path}.{name}", depth - 1)

    def state(self) -> dict[str, Any]:
        """Tensors and primitives."""
        state: dict[str, Any] = {}
        for path, found in self._objects.items():
            if _is_generator(found):
                state[path] = pack(_generator_state(found))
            elif changed := _changed(_attributes(found), self._at_first[path]):
                state[path] = changed
        return state

    def load(self, state: dict[str, Any]) -> None:
        """Counters that had never changed by then become what they were at first."""
        for path, found in self._objects.items():
            if _is_generator(found):
                if path in state:
                    _set_generator_state(found, unpack(state[path]))
                continue
            now, then = _attributes(found), {**self._at_first[path], **state.get(path, {})}
            for name, value in then.items():
                if name not in now or now[name] != value:
                    found.__dict__[name] = value


def _attributes(found: Any) -> dict[str, Any]:
    return {k: v for k, v in getattr(found, "__dict__", {}).items() if type(v) in _PRIMITIVES}


def _changed(now: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in now.items() if k not in first or first[k] != v}


def _is_generator(value: Any) -> bool:
    import numpy as np
    import torch

    return isinstance(value, torch.Generator | random.Random | np.random.Generator | np.random.RandomState)


def _generator_state(generator: Any) -> Any:
    import torch

    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        version, internal, gauss = generator.getstate()
        return [version, torch.tensor(internal, dtype=torch.int64), gauss]
    bits = getattr(generator, "bit_generator", None)
    return bits.state if bits is not None else generator.get_state(legacy=False)


def _set_generator_state(generator: Any, state: Any) -> None:
    import torch

    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        version, internal, gauss = state
        generator.setstate((version, tuple(internal.tolist()), gauss))
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


_ARRAY = "__numpy__"


def pack(value: Any) -> Any:
    """A copy of a user's state for a checkpoint: numpy's arrays and numbers as tensors and primitives."""
    import numpy as np
    import torch

    if isinstance(value, np.ndarray):
        wide = value.astype(np.int64) if value.dtype.kind == "u" and value.dtype.itemsize < 8 else value
        return {_ARRAY: str(value.dtype), "values": torch.from_numpy(np.ascontiguousarray(wide).copy())}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) is dict:
        return {k: pack(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(pack(v) for v in value)
    return value


def unpack(value: Any) -> Any:
    """The inverse of `pack`."""
    if type(value) is dict:
        if _ARRAY in value:
            return value["values"].numpy().astype(value[_ARRAY])
        return {k: unpack(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(unpack(v) for v in value)
    return value
