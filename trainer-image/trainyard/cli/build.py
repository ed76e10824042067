"""From a configuration to objects, and to the whole configuration with all defaults."""

from __future__ import annotations

import datetime
import enum
import functools
import inspect
import typing
from collections.abc import Collection, Mapping
from typing import Any

from trainyard.cli.classes import find_class, path_of
from trainyard.cli.config import ARGUMENTS, CLASS
from trainyard.cli.errors import CliError
from trainyard.core.portable import text_of, to_portable
from trainyard.utilities.convert import ConversionError, Text, convert
from trainyard.utilities.hints import Parameter, check_names, parameters_of, takes_anything, type_name


def instantiate(
    cls: Any, given: Mapping[str, Any], place: str, *, fixed: Mapping[str, Any] | None = None
) -> Any:
    """`cls(**given, **fixed)` with the values of `given` converted to their hints. Raises CliError for these; what the
    class itself raises, it raises."""
    arguments = arguments_of(cls, given, place, make=build, fixed=fixed or {})
    return cls(**arguments, **(fixed or {}))


def arguments_of(
    cls: Any,
    given: Mapping[str, Any],
    place: str,
    *,
    make: Any,
    fixed: Collection[str] = (),
    closed: bool = False,
) -> dict[str, Any]:
    """Raises CliError: an unknown name, a missing one, a value of another type, each with its place."""
    known = {p.name: p for p in parameters_of(cls) if p.name not in fixed}
    name = type_name(cls)
    try:
        if closed or not takes_anything(cls):
            check_names(given, known, place, of=name)
        return {
            key: convert(value, known[key].hint if key in known else Any, f"{place}.{key}", make)
            for key, value in given.items()
            if _is_given(value, known.get(key))
        }
    except ConversionError as error:
        raise CliError(f"{error.place}: {error.problem}") from None


def check_required(cls: Any, given: Collection[str], place: str, fixed: Collection[str] = ()) -> None:
    """Raises CliError."""
    missing = [
        p.name for p in parameters_of(cls) if p.required and p.name not in given and p.name not in fixed
    ]
    if missing:
        raise CliError(f"{place}: {type_name(cls)} needs {', '.join(missing)}")


def _default(parameter: Parameter) -> Any:
    """As its hint has it: a 0 for a float is 0.0, in a file that is read again as well as in the first."""
    try:
        return convert(parameter.default, parameter.hint)
    except ConversionError:
        return parameter.default


def _is_given(value: Any, parameter: Parameter | None) -> bool:
    """A saved configuration has null for required arguments that something else supplies."""
    return not (value is None and parameter is not None and parameter.required)


# ---- what a class_path leads to (`convert.Make`)


def build(value: Any, hint: Any, place: str) -> Any:
    """An instance; for a Callable that returns one, a partial that makes it."""
    cls, given = class_of(value, hint, place)
    if _is_factory(hint, cls):
        return functools.partial(cls, **arguments_of(cls, given, place, make=build))
    check_required(cls, given, place)
    return cls(**arguments_of(cls, given, place, make=build))


def describe(value: Any, hint: Any, place: str) -> dict[str, Any]:
    """The configuration of that instance, with its defaults. Checks all that `build` would, and makes nothing."""
    cls, given = class_of(value, hint, place)
    factory = _is_factory(hint, cls)
    if not factory:
        check_required(cls, given, place)
    return {CLASS: path_of(cls), ARGUMENTS: describe_arguments(cls, given, place)}


def describe_arguments(
    cls: Any, given: Mapping[str, Any], place: str, *, fixed: Collection[str] = (), closed: bool = False
) -> dict[str, Any]:
    """All arguments in their order: the given ones as they will be, the others with their defaults."""
    arguments = arguments_of(cls, given, place, make=describe, fixed=fixed, closed=closed)
    found = {p.name: p for p in parameters_of(cls) if p.name not in fixed}
    ordered = {
        name: arguments[name] if name in arguments else _default(p)
        for name, p in found.items()
        if name in arguments or not p.required
    }
    return {name: writable(value) for name, value in {**ordered, **arguments}.items()}


def class_of(value: Any, hint: Any, place: str) -> tuple[Any, dict[str, Any]]:
    """(class, its arguments) of {class_path, init_args} or of a name. Raises ConversionError."""
    base = _base(hint)
    if isinstance(value, str):
        return find_class(str(value), base, place), {}
    if not isinstance(value, Mapping):
        raise ConversionError(place, f"{value!r} is no {type_name(hint)}")
    if CLASS not in value:
        raise ConversionError(place, f"a {type_name(base)} is given as class_path and init_args")
    check_names(value, (CLASS, ARGUMENTS), place, of="a class in a configuration")
    given = value.get(ARGUMENTS) or {}
    if not isinstance(given, Mapping):
        raise ConversionError(f"{place}.{ARGUMENTS}", f"{given!r} is no mapping of arguments")
    return find_class(str(value[CLASS]), base, f"{place}.{CLASS}"), dict(given)


def _base(hint: Any) -> type:
    if typing.get_origin(hint) is not None:
        return object
    return hint if isinstance(hint, type) else object


def _is_factory(hint: Any, cls: Any) -> bool:
    """Whether a Callable is wanted that makes such objects: `Callable[[Iterable], Optimizer]`."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is None or len(inner) != 2:
        return False
    returned = inner[1]
    return isinstance(returned, type) and isinstance(cls, type) and issubclass(cls, returned)


def writable(value: Any) -> Any:
    """As YAML."""
    if isinstance(value, Text):
        return str(value)
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, datetime.timedelta):
        return {"seconds": value.total_seconds()}
    if isinstance(value, Mapping):
        return {str(k): writable(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [writable(v) for v in value]
    if value is inspect.Parameter.empty:
        return None
    if isinstance(value, type):
        return path_of(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return text_of(value)
    portable = to_portable(value).value
    return portable if isinstance(portable, bool | int | float | str | dict | list | None) else str(portable)
