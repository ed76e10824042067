"""`load_from_checkpoint`, and hyperparameters in files of their own."""

from __future__ import annotations

import csv
import logging
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from trainyard.core.portable import OWN, Kind, text_of, to_portable
from trainyard.utilities.convert import ConversionError, convert
from trainyard.utilities.hints import Parameter, parameters_of, takes_anything
from trainyard.utilities.parsing import AttributeDict

if TYPE_CHECKING:
    from trainyard.trainer.ckpt_file import MapLocation, Place

_log = logging.getLogger("trainyard")
T = TypeVar("T")

_CLI_KEYS = ("_instantiator", "_class_path")
"""What LightningCLI adds to the hyperparameters that it saves."""


class class_only:
    """A classmethod that says so when it is called on an instance, where its result would be thrown away."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return types.MethodType(self._function, owner)
        name = self._function.__name__

        def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
            raise TypeError(
                f"{name} makes a new object: call it on the class, as {owner.__name__}.{name}(...)"
            )

        return types.MethodType(refuse, instance)


class LoadModule:
    """Part of LightningModule."""

    @class_only
    def load_from_checkpoint(
        cls: type[T], checkpoint_path: Place | IO[bytes], map_location: MapLocation = None,
        hparams_file: str | Path | None = None, strict: bool | None = None, weights_only: bool | None = None,
        **kwargs: Any,
    ) -> T:  # fmt: skip
        """The module of a checkpoint: made with the arguments that `save_hyperparameters` kept, and its weights.

        `kwargs` override them; `hparams_file` (.yaml or .csv) takes their place. Arguments that `__init__` does not take
        are left out. Raises what `ckpt_file.read` does, CheckpointMismatch for weights of another module, TypeError for
        an argument that is neither in the checkpoint nor given.
        """
        checkpoint = _read(checkpoint_path, map_location, weights_only)
        module = _make(cls, checkpoint, hparams_file, kwargs)
        _load_weights(module, checkpoint, str(checkpoint_path), strict)
        return module


class LoadDataModule:
    """Part of LightningDataModule."""

    @class_only
    def load_from_checkpoint(
        cls: type[T], checkpoint_path: Place | IO[bytes], map_location: MapLocation = None,
        hparams_file: str | Path | None = None, weights_only: bool | None = None, **kwargs: Any,
    ) -> T:  # fmt: skip
        """The data module of a checkpoint, with its arguments and its state. As the module's."""
        checkpoint = _read(checkpoint_path, map_location, weights_only)
        made: Any = _make(cls, checkpoint, hparams_file, kwargs)
        if (state := checkpoint.get(type(made).__qualname__)) is not None:
            made.load_state_dict(state)
        return made  # type: ignore[no-any-return]


def _read(place: Any, map_location: Any, weights_only: bool | None) -> dict[str, Any]:
    from trainyard.trainer import ckpt_file

    return ckpt_file.read(place, map_location, weights_only)


def _load_weights(module: Any, checkpoint: dict[str, Any], name: str, strict: bool | None) -> None:
    import torch

    from trainyard.checkpoint.snapshot import load_model

    chosen = module.__dict__.get("_strict_loading")
    if strict is not None and chosen is not None and strict != chosen:
        raise ValueError(
            f"load_from_checkpoint(strict={strict}), but {type(module).__name__}.strict_loading is {chosen}; say the same"
        )
    module.configure_model()
    module.on_load_checkpoint(checkpoint)
    state = checkpoint["state_dict"]
    load_model(module, state, name, strict=module.strict_loading if strict is None else strict)
    tensor = next((value for value in state.values() if isinstance(value, torch.Tensor)), None)
    if tensor is None:
        _log.warning("%s has no weights", name)
    else:
        module.to(tensor.device)


# ---- arguments


def _make(cls: type[T], checkpoint: Mapping[str, Any], hparams_file: Any, overrides: Mapping[str, Any]) -> T:
    key = cls.CHECKPOINT_HYPER_PARAMS_KEY  # type: ignore[attr-defined]
    kinds: Mapping[str, str] = (checkpoint.get(OWN) or {}).get(key, {})
    saved = dict(checkpoint.get(key) or {})
    if hparams_file is not None:
        saved, kinds = load_hparams(hparams_file), {}
    cls = _class_of(cls, saved)
    for name in _CLI_KEYS:
        saved.pop(name, None)
    known = {p.name: p for p in parameters_of(cls)}
    whole = checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_NAME)  # type: ignore[attr-defined]
    if whole in known and whole not in overrides and whole != "kwargs":
        arguments = {whole: _whole(cls, known[whole], {**saved, **overrides}, kinds, overrides)}
    else:
        arguments = {
            key: _argument(cls, known.get(key), key, value, kinds.get(key, Kind.SAME))
            for key, value in saved.items()
            if key not in overrides and (key in known or takes_anything(cls))
        }
    arguments.update((k, v) for k, v in overrides.items() if k in known or takes_anything(cls))
    unused = [k for k in overrides if k not in arguments and k not in saved]
    if unused:
        _log.warning("load_from_checkpoint: %s takes no %s", cls.__name__, ", ".join(unused))
    missing = [p.name for p in known.values() if p.required and p.name not in arguments]
    if missing:
        raise TypeError(
            f"{cls.__name__} needs {', '.join(missing)}, not in the checkpoint: give it, as "
            f"{cls.__name__}.load_from_checkpoint(..., {missing[0]}=...), or call save_hyperparameters() in __init__"
        )
    return cls(**arguments)


def _class_of(cls: type[T], saved: Mapping[str, Any]) -> type[T]:
    """The subclass that LightningCLI noted, if the program has imported it already: a checkpoint imports nothing."""
    module, _, name = str(saved.get("_class_path") or "").rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) and issubclass(found, cls) else cls


def _argument(cls: type, parameter: Parameter | None, name: str, value: Any, kind: str) -> Any:
    """Of the plain value in the checkpoint. Raises TypeError when that does not say enough."""
    if kind == Kind.SAME:
        return value
    if parameter is not None and not parameter.required and _same(parameter.default, value, kind):
        return parameter.default
    if kind == Kind.TYPED and parameter is not None and parameter.hint is not Any:
        try:
            return convert(value, parameter.hint, name)
        except ConversionError as error:
            problem = str(error)
    else:
        problem = f"the checkpoint has only {value!r} of it"
    raise TypeError(
        f"{cls.__name__}.{name} cannot be made anew from the checkpoint ({problem}): give it, as "
        f"load_from_checkpoint(..., {name}=...)"
    )


def _same(default: Any, value: Any, kind: str) -> bool:
    portable = to_portable(default)
    if kind == Kind.TEXT:
        return portable.kind == Kind.TEXT and text_of(default) == value
    try:
        return bool(portable.value == value)
    except (RuntimeError, ValueError):  # tensors
        return False


def _whole(
    cls: type,
    parameter: Parameter,
    values: dict[str, Any],
    kinds: Mapping[str, str],
    overrides: Mapping[str, Any],
) -> Any:
    """The one object that `save_hyperparameters(object)` was given."""
    import dataclasses

    lost = [key for key, kind in kinds.items() if kind == Kind.TEXT and key not in overrides]
    if lost:
        raise TypeError(
            f"{cls.__name__}.{parameter.name} cannot be made anew: the checkpoint has only a text of its {', '.join(lost)}; "
            f"give it, as load_from_checkpoint(..., {parameter.name}=...)"
        )
    if dataclasses.is_dataclass(parameter.hint):
        names = {f.name for f in dataclasses.fields(parameter.hint) if f.init}
        return convert({k: v for k, v in values.items() if k in names}, parameter.hint, parameter.name)
    return AttributeDict(values)


# ---- files


def load_hparams(path: str | Path) -> dict[str, Any]:
    """Of a .yaml or .csv file. Raises ValueError for another one, FileNotFoundError."""
    suffix = Path(path).suffix.lower()
    if suffix in (".yaml", ".yml"):
        return load_hparams_from_yaml(path)
    if suffix == ".csv":
        return load_hparams_from_tags_csv(path)
    raise ValueError(f"hparams_file: {path} is neither .yaml nor .csv")


def load_hparams_from_yaml(config_yaml: str | Path, use_omegaconf: bool = True) -> dict[str, Any]:
    """What `save_hparams_to_yaml`, or a logger, has written. Raises FileNotFoundError, YamlError."""
    from trainyard.utilities.yaml import parse

    found = parse(Path(config_yaml).read_text(encoding="utf-8"), str(config_yaml)) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{config_yaml} holds no mapping")  # noqa: TRY004 - what it holds is wrong, not its type
    return found


def save_hparams_to_yaml(config_yaml: str | Path, hparams: Any, use_omegaconf: bool = True) -> None:
    """Plain YAML; what is no number, string or list of those is written as its text. Raises FileNotFoundError if there is
    no such folder."""
    from trainyard.loggers.hparams_file import to_yaml
    from trainyard.loggers.values import jsonable

    Path(config_yaml).write_text(to_yaml(jsonable(hparams)), encoding="utf-8")


def load_hparams_from_tags_csv(tags_csv: str | Path) -> dict[str, Any]:
    """Columns `key` and `value`, as old versions of Lightning have written."""
    from trainyard.utilities.yaml import parse

    with Path(tags_csv).open(newline="", encoding="utf-8") as file:
        return {row["key"]: parse(row["value"]) for row in csv.DictReader(file)}


def save_hparams_to_tags_csv(tags_csv: str | Path, hparams: Any) -> None:
    """The inverse of `load_hparams_from_tags_csv`."""
    with Path(tags_csv).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "value"])
        writer.writerows(hparams.items())
