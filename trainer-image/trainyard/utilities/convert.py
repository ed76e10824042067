"""From what a YAML file, a command line or a checkpoint holds to what a type hint asks for."""

from __future__ import annotations

import collections.abc
import dataclasses
import datetime
import enum
import types
import typing
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any, Literal, Union

from trainyard.utilities.hints import parameters_of, type_name


class ConversionError(ValueError):
    """A value that its hint does not allow. `place` says where it was, as `trainer.max_epochs`; `shaped`: it looks like
    what the hint asks for, so that of several hints this one was meant."""

    def __init__(self, place: str, problem: str, *, shaped: bool = False) -> None:
        super().__init__(f"{place}: {problem}" if place else problem)
        self.place = place
        self.problem = problem
        self.shaped = shaped


class Text(str):
    """A value from a command line: a YAML scalar, or a plain string where one is wanted."""

    __slots__ = ()


Make = Callable[[Any, Any, str], Any]
"""(value, class, place): an instance of the class or of a subclass, from what names one. Raises ConversionError."""

_LISTS: dict[Any, type] = {
    list: list, tuple: tuple, set: set, frozenset: frozenset, collections.abc.Sequence: list,
    collections.abc.MutableSequence: list, collections.abc.Iterable: list, collections.abc.Collection: list,
    collections.abc.Set: set,
}  # fmt: skip
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


def convert(value: Any, hint: Any, place: str = "", make: Make | None = None) -> Any:
    """`value` as `hint` says. Raises ConversionError.

    Numbers are not made of texts, except in a `Text`; an int is a float too. A dataclass is made of a dict, an
    enumeration's member of its name or value. With `make`, instances of other classes may be made; without, they must
    be instances already.
    """
    if isinstance(value, Text):
        return _of_text(value, hint, place, make)
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return convert(value, typing.get_args(hint)[0], place, make)
    if hint in (Any, object) or isinstance(hint, typing.TypeVar):
        return _of_anything(value, place, make)
    if hint is None:
        hint = type(None)
    if origin in (Union, types.UnionType):
        return _of_union(value, typing.get_args(hint), hint, place, make)
    if origin is Literal:
        return _choice(value, {str(a): a for a in typing.get_args(hint)}, list(typing.get_args(hint)), place)
    kind = origin or hint
    if kind in _LISTS:
        return _of_list(value, hint, kind, place, make)
    if kind in _MAPPINGS:
        return _of_mapping(value, hint, place, make)
    if kind in (type, collections.abc.Callable):
        return _imported(value, hint, kind, place, make)
    if isinstance(kind, type):
        return _of_class(value, kind, place, make)
    return value


def _of_text(text: Text, hint: Any, place: str, make: Make | None) -> Any:
    from trainyard.utilities.yaml import parse

    plain = str(text)
    try:
        value = parse(plain)
    except ValueError:
        value = plain
    if isinstance(value, str) or hint is str:
        return convert(plain, hint, place, make)
    try:
        return convert(value, hint, place, make)
    except ConversionError:
        with_text = _try(plain, hint, place, make)
        if with_text is _NO:
            raise
        return with_text


_NO = object()


def _try(value: Any, hint: Any, place: str, make: Make | None) -> Any:
    try:
        return convert(value, hint, place, make)
    except ConversionError:
        return _NO


def _of_anything(value: Any, place: str, make: Make | None) -> Any:
    """As it is, but for what says itself that it stands for an object."""
    if make is not None and isinstance(value, Mapping) and "class_path" in value:
        return make(value, object, place)
    if isinstance(value, list):
        return [_of_anything(part, f"{place}[{i}]", make) for i, part in enumerate(value)]
    return value


def _of_union(value: Any, options: tuple[Any, ...], hint: Any, place: str, make: Make | None) -> Any:
    if value is None and type(None) in options:
        return None
    # What needs no conversion comes first: True stays True for `int | bool`, "7" a string for `int | str`.
    for option in options:
        if option is type(value):
            return value
    deepest: ConversionError | None = None
    for option in options:
        if option is type(None):
            continue
        try:
            return convert(value, option, place, make)
        except ConversionError as error:
            inside = error.shaped or error.place != place
            if inside and (deepest is None or len(error.place) > len(deepest.place)):
                deepest = error
    # An option that failed further inside is the one that was meant.
    raise deepest or _wrong(value, hint, place)


def _choice(value: Any, by_name: Mapping[str, Any], options: list[Any], place: str) -> Any:
    for option in options:
        if value == option and isinstance(value, bool) == isinstance(option, bool):
            return option
    if isinstance(value, str) and value in by_name:
        return by_name[value]
    raise ConversionError(place, f"{value!r} is none of {', '.join(repr(o) for o in options)}", shaped=True)


def _of_list(value: Any, hint: Any, kind: Any, place: str, make: Make | None) -> Any:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, collections.abc.Iterable):
        raise _wrong(value, hint, place)
    inner, items = typing.get_args(hint), list(value)
    if kind is tuple and inner and inner[-1] is not Ellipsis:
        if len(items) != len(inner):
            raise ConversionError(place, f"has {len(items)} entries, {type_name(hint)} wants {len(inner)}")
        hints = list(inner)
    else:
        hints = [inner[0] if inner else Any] * len(items)
    made = [convert(v, h, f"{place}[{i}]", make) for i, (v, h) in enumerate(zip(items, hints, strict=True))]
    return _LISTS[kind](made)


def _of_mapping(value: Any, hint: Any, place: str, make: Make | None) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(value, hint, place)
    inner = typing.get_args(hint)
    if len(inner) != 2:
        return dict(value)
    return {convert(k, inner[0], place): convert(v, inner[1], f"{place}.{k}", make) for k, v in value.items()}


def _imported(value: Any, hint: Any, kind: Any, place: str, make: Make | None) -> Any:
    """A class or function, from its import path; for a Callable also what a class_path leads to."""
    from trainyard.utilities.hints import import_path

    if callable(value):
        return value
    if make is not None and kind is not type and isinstance(value, Mapping):
        return make(value, hint, place)
    if make is None or not isinstance(value, str):
        raise _wrong(value, hint, place)
    try:
        found = import_path(value)
    except ImportError as error:
        raise ConversionError(place, str(error)) from None
    base = typing.get_args(hint)
    if kind is type and base and isinstance(base[0], type) and not issubclass(found, base[0]):
        raise ConversionError(place, f"{value} is no subclass of {type_name(base[0])}")
    return found


def _of_class(value: Any, kind: type, place: str, make: Make | None) -> Any:  # a table of types
    if kind is bool or kind is type(None):
        if isinstance(value, kind):
            return value
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer():
            return int(value)
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif issubclass(kind, enum.Enum):
        return _member(value, kind, place)
    elif isinstance(value, kind):
        return value
    elif issubclass(kind, PurePath):
        if isinstance(value, str):
            return Path(value) if kind is Path else kind(value)
    elif dataclasses.is_dataclass(kind):
        if isinstance(value, Mapping) and "class_path" not in value:
            return _dataclass(value, kind, place, make)
    elif kind is Namespace:
        if isinstance(value, Mapping):
            return Namespace(**value)
    elif kind is datetime.timedelta:
        if isinstance(value, Mapping):
            return datetime.timedelta(**value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return datetime.timedelta(seconds=value)
    elif kind is complex:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return complex(value)
    elif (known := _torch_value(value, kind)) is not None:
        return known
    if make is not None and kind not in (bool, int, float, str, bytes, complex, type(None)):
        return make(value, kind, place)
    raise _wrong(value, kind, place)


def _member(value: Any, kind: type[enum.Enum], place: str) -> enum.Enum:
    if isinstance(value, str) and value in kind.__members__:
        return kind[value]
    try:
        return kind(value)
    except ValueError:
        raise ConversionError(
            place, f"{value!r} is none of {', '.join(kind.__members__)}", shaped=True
        ) from None


def _torch_value(value: Any, kind: type) -> Any:
    """A device, dtype or array of what stands for it; None if it does not."""
    if kind.__module__ == "torch" and isinstance(value, str):
        import torch

        if kind is torch.device:
            return torch.device(value)
        if kind is torch.dtype:
            found = getattr(torch, value.removeprefix("torch."), None)
            return found if isinstance(found, torch.dtype) else None
    if kind.__module__ == "numpy" and kind.__name__ == "ndarray" and hasattr(value, "numpy"):
        return value.numpy()
    return None


def _dataclass(value: Mapping[str, Any], kind: type, place: str, make: Make | None) -> Any:
    from trainyard.utilities.hints import check_names

    known = {p.name: p for p in parameters_of(kind)}
    check_names(value, known, place, of=type_name(kind))
    arguments = {k: convert(v, known[k].hint, f"{place}.{k}", make) for k, v in value.items()}
    missing = [name for name, p in known.items() if p.required and name not in arguments]
    if missing:
        raise ConversionError(place, f"{type_name(kind)} needs {', '.join(missing)}", shaped=True)
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:  # what its __post_init__ says
        raise ConversionError(place, str(error), shaped=True) from error


def _wrong(value: Any, hint: Any, place: str) -> ConversionError:
    shown = repr(value)
    shown = shown if len(shown) < 80 else f"{shown[:77]}..."
    return ConversionError(place, f"{shown} is no {type_name(hint)}")
