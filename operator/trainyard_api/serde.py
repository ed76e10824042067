"""Frozen dataclasses to camelCase dicts and back, with errors that name the field.

Small on purpose: the CRD schema validates what users write; this guards what crosses a process boundary.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from enum import Enum
from typing import Any, TypeVar, get_args, get_origin

T = TypeVar("T")


@functools.cache
def camel(name: str) -> str:
    """snake_case -> camelCase; "pod_uid" -> "podUid", with the API's spelling of initialisms kept simple."""
    head, *tail = name.split("_")
    return head + "".join(part[:1].upper() + part[1:] for part in tail)


@functools.cache
def _fields(cls: type) -> tuple[tuple[str, str, Any, bool], ...]:
    hints = typing.get_type_hints(cls)
    return tuple(
        (
            f.name,
            f.metadata.get("key", camel(f.name)),
            hints[f.name],
            f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING,
        )
        for f in dataclasses.fields(cls)
    )


def encode(value: Any) -> Any:
    """A JSON value of a dataclass tree. None fields are left out; tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out = {}
        for name, key, _, _ in _fields(type(value)):
            item = getattr(value, name)
            if item is not None:
                out[key] = encode(item)
        return out
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {k: encode(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [encode(v) for v in value]
    return value


def decode(cls: type[T], data: Any, *, path: str = "") -> T:
    """A `cls` from its JSON value. Unknown keys are ignored (a newer peer may send more).

    Raises ValueError with the path of the field that is missing or of the wrong type.
    """
    return typing.cast(T, _decode(cls, data, path or cls.__name__))


def _decode(hint: Any, data: Any, path: str) -> Any:
    origin = get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        options = get_args(hint)
        if data is None and type(None) in options:
            return None
        kinds = [o for o in options if o is not type(None)]
        if len(kinds) > 1:  # int | str, as the API has it for steps and quantities
            if type(data) in kinds:
                return data
            raise ValueError(
                f"{path}: expected {' or '.join(k.__name__ for k in kinds)}, got {type(data).__name__}"
            )
        return _decode(kinds[0], data, path)
    if hint is Any:
        return data
    if origin in (list, tuple):
        if not isinstance(data, list):
            raise ValueError(f"{path}: expected a list, got {type(data).__name__}")
        (item, *_) = get_args(hint)
        items = [_decode(item, v, f"{path}[{i}]") for i, v in enumerate(data)]
        return tuple(items) if origin is tuple else items
    if origin is dict:
        if not isinstance(data, dict):
            raise ValueError(f"{path}: expected an object, got {type(data).__name__}")
        return {str(k): _decode(get_args(hint)[1], v, f"{path}.{k}") for k, v in data.items()}
    if dataclasses.is_dataclass(hint):
        if not isinstance(data, dict):
            raise ValueError(f"{path}: expected an object, got {type(data).__name__}")
        kwargs = {}
        for name, key, sub, required in _fields(typing.cast(type, hint)):
            if data.get(key) is not None:
                kwargs[name] = _decode(sub, data[key], f"{path}.{key}")
            elif required:
                raise ValueError(f"{path}.{key}: required")
        return hint(**kwargs)  # type: ignore[operator]
    if isinstance(hint, type) and issubclass(hint, Enum):
        try:
            return hint(data)
        except ValueError:
            raise ValueError(
                f"{path}: {data!r} is not one of {', '.join(str(m.value) for m in hint)}"
            ) from None
    if hint is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if isinstance(hint, type) and (not isinstance(data, hint) or (hint is int and isinstance(data, bool))):
        raise ValueError(f"{path}: expected {hint.__name__}, got {type(data).__name__}")
    return data
