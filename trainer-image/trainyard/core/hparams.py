"""`save_hyperparameters`, for modules and data modules."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import logging
from argparse import Namespace
from collections.abc import Mapping, MutableMapping, Sequence
from types import FrameType
from typing import Any, ClassVar

from trainyard.core.portable import OWN, Kind, to_portable
from trainyard.utilities.parsing import AttributeDict

_log = logging.getLogger("trainyard")


class HyperparametersMixin:
    """Part of LightningModule and LightningDataModule."""

    CHECKPOINT_HYPER_PARAMS_KEY: ClassVar[str] = "hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME: ClassVar[str] = "hparams_name"
    CHECKPOINT_HYPER_PARAMS_TYPE: ClassVar[str] = "hparams_type"
    _log_hyperparams: bool = False

    def save_hyperparameters(
        self, *args: Any, ignore: Sequence[str] | str | None = None, frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:  # fmt: skip
        """Keep the arguments of `__init__` in `self.hparams`, in checkpoints and, with `logger`, in the loggers.

        Without `args` all arguments of all `__init__`s that are running, from this class's parents to the class that is
        made; with names only those; with one dict, Namespace, dataclass or OmegaConf container its entries. `frame` is
        that of `__init__`, if this is not called from it directly. Raises ValueError for anything else.
        """
        self.__dict__["_log_hyperparams"] = logger
        if len(args) == 1 and isinstance(args[0], Mapping | Sequence) and not args[0]:
            return
        if frame is None:
            here = inspect.currentframe()
            frame = None if here is None else here.f_back
        ignored = {ignore} if isinstance(ignore, str) else set(ignore or ())
        arguments = {k: v for k, v in _arguments(self, frame).items() if k not in ignored}
        objects = [arg for arg in args if not isinstance(arg, str)]
        if len(objects) > 1:
            raise ValueError(
                f"save_hyperparameters takes names, or one object; it was given {len(objects)} objects"
            )
        if objects:
            given = objects[0]
            name = next((k for k, v in arguments.items() if v is given), None)
            name = name or next((k for k, v in arguments.items() if _same(v, given)), None)
            self._set_hparams(given)
        else:
            if unknown := [arg for arg in args if arg not in arguments]:
                raise ValueError(
                    f"save_hyperparameters: {', '.join(unknown)}: no such argument of {type(self).__name__}, which has "
                    f"{', '.join(arguments) or 'none'}"
                )
            chosen = {arg: arguments[arg] for arg in args} if args else arguments
            name = "kwargs" if chosen else None
            self._set_hparams(chosen)
        self.__dict__["_hparams_name"] = name
        for key in ignored:
            self.hparams.pop(key, None)
        self._warn_of_modules()
        self.__dict__["_hparams_initial"] = _copy(self.hparams)

    def _set_hparams(self, given: Any) -> None:
        new = _as_mapping(given)
        if isinstance(new, dict) and isinstance(self.hparams, dict):
            self.hparams.update(new)
        else:
            self.__dict__["_hparams"] = new

    @property
    def hparams(self) -> Any:
        """An AttributeDict; may be changed."""
        return self.__dict__.setdefault("_hparams", AttributeDict())

    @property
    def hparams_initial(self) -> AttributeDict:
        """A copy of the hyperparameters as they were saved."""
        return _copy(self.__dict__.get("_hparams_initial", AttributeDict()))  # type: ignore[no-any-return]

    def _warn_of_modules(self) -> None:
        import torch

        for key, value in self.hparams.items():
            if isinstance(value, torch.nn.Module):
                _log.warning(
                    "hyperparameter %r of %s is a module: its weights are in checkpoints anyway; leave it out with "
                    "save_hyperparameters(ignore=[%r])", key, type(self).__name__, key,
                )  # fmt: skip

    def _dump_hparams(self, checkpoint: dict[str, Any]) -> None:
        """Into a checkpoint: tensors and primitives. What is none of these is named in a warning, once."""
        if not self.hparams:
            return
        plain = {str(key): to_portable(value) for key, value in self.hparams.items()}
        lost = {key: value for key, value in plain.items() if value.kind == Kind.TEXT}
        if lost and not self.__dict__.get("_warned_of_hparams"):
            self.__dict__["_warned_of_hparams"] = True
            _log.warning(
                "checkpoints keep only a text of these hyperparameters of %s, which are no numbers, strings or tensors: %s; "
                "load_from_checkpoint will ask for them", type(self).__name__, ", ".join(lost),
            )  # fmt: skip
        if "_hparams_name" in self.__dict__:
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_NAME] = self.__dict__["_hparams_name"]
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = {key: value.value for key, value in plain.items()}
        kinds = {key: value.kind.value for key, value in plain.items() if value.kind != Kind.SAME}
        if kinds:
            checkpoint.setdefault(OWN, {})[self.CHECKPOINT_HYPER_PARAMS_KEY] = kinds


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    try:
        equal = one == other
        return bool(equal.all()) if hasattr(equal, "all") else bool(equal)
    except (RuntimeError, TypeError, ValueError):  # tensors of two shapes, and what cannot be compared
        return False


def _arguments(owner: Any, frame: FrameType | None) -> dict[str, Any]:
    """Of the `__init__`s of `owner` that are on the stack; those of subclasses override those of their parents."""
    if dataclasses.is_dataclass(owner):
        return {f.name: getattr(owner, f.name) for f in dataclasses.fields(owner) if f.init}
    inits = {
        getattr(inspect.unwrap(vars(c)["__init__"]), "__code__", None)
        for c in type(owner).__mro__
        if "__init__" in vars(c)
    }
    found: dict[str, Any] = {}
    while frame is not None:
        code = frame.f_code
        if code in inits and frame.f_locals.get(code.co_varnames[0]) is owner:
            found.update(_of_frame(frame))
        frame = frame.f_back
    return found


def _of_frame(frame: FrameType) -> dict[str, Any]:
    info = inspect.getargvalues(frame)
    values = {name: info.locals[name] for name in info.args[1:] if name in info.locals}
    if info.keywords:
        values.update(info.locals.get(info.keywords, {}))
    return {name: value for name, value in values.items() if name != "__class__"}


def _as_mapping(given: Any) -> MutableMapping[str, Any]:
    """Raises ValueError."""
    if isinstance(given, Namespace):
        return AttributeDict(vars(given))
    if isinstance(given, dict):
        return AttributeDict(given)
    if dataclasses.is_dataclass(given) and not isinstance(given, type):
        return AttributeDict({f.name: getattr(given, f.name) for f in dataclasses.fields(given)})
    if isinstance(given, MutableMapping):
        return given  # OmegaConf's stay what they are
    if isinstance(given, Mapping):
        return AttributeDict(given)
    raise ValueError(  # Lightning's type for it
        f"save_hyperparameters takes names of arguments, a dict, Namespace or dataclass, not a {type(given).__name__}"
    )


def _copy(values: Any) -> Any:
    """Deep; what cannot be copied, or would cost the memory of a model, is shared."""
    import torch

    if not isinstance(values, dict):
        with contextlib.suppress(Exception):
            return copy.deepcopy(values)
        return copy.copy(values)
    out = AttributeDict()
    for key, value in values.items():
        out[key] = value
        if not isinstance(value, torch.nn.Module):
            with contextlib.suppress(Exception):
                out[key] = copy.deepcopy(value)
    return out
