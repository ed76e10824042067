"""What a command line may set: sections, their defaults, and links between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trainyard.cli.arguments import Arguments, parse
from trainyard.cli.build import check_required, class_of, describe, describe_arguments, writable
from trainyard.cli.config import ARGUMENTS, CLASS, Config, load, merge, override
from trainyard.cli.errors import CliError
from trainyard.utilities.convert import ConversionError, convert
from trainyard.utilities.hints import nearest

_MISSING: Any = object()


@dataclass(slots=True)
class Section:
    """One top-level name of a configuration."""

    key: str
    doc: str = ""
    cls: Any = None
    """The class of an object; None for a plain value."""
    subclasses: bool = False
    """Given as class_path and init_args of a class that derives from `cls`; else as the arguments of `cls` itself."""
    hint: Any = Any
    """Of a plain value."""
    default: Any = None
    required: bool = False
    fixed: tuple[str, ...] = ()
    """Arguments that something else supplies."""
    closed: bool = False
    """No argument but those of the signature, whatever `**kwargs` it has."""
    extra: tuple[str, ...] = ()
    """Arguments that are not the class's."""


@dataclass(slots=True)
class Link:
    source: tuple[str, ...]
    target: str
    compute: Callable[..., Any] | None
    late: bool
    """The sources are attributes of objects that are made already."""


class ArgumentParser:
    """`LightningArgumentParser`, as far as `add_arguments_to_parser` makes use of it."""

    def __init__(self, verbs: Sequence[str] = ()) -> None:
        self.verbs = tuple(verbs)
        self.sections: dict[str, Section] = {}
        self.links: list[Link] = []
        self.callback_keys: list[str] = []
        self.optimizer_keys: list[str] = []
        self.scheduler_keys: list[str] = []
        self._defaults: Config = {}

    # ---- to be called

    def add_section(self, section: Section) -> None:
        """Raises CliError if there is one of that name."""
        if section.key in self.sections:
            raise CliError(f"{section.key}: there are two sections of this name")
        self.sections[section.key] = section

    def add_argument(self, name: str, *, type: Any = Any, default: Any = None, help: str = "") -> None:
        """A plain value, `--name`."""
        key = name.lstrip("-")
        self.add_section(Section(key, help, hint=type, default=default))

    def add_class_arguments(self, cls: Any, nested_key: str, **_: Any) -> None:
        """An object of `cls`, given by its arguments."""
        self.add_section(Section(nested_key, cls=cls))

    def add_subclass_arguments(self, cls: Any, nested_key: str, required: bool = False, **_: Any) -> None:
        """An object of a subclass of `cls`, given by class_path and init_args."""
        base = cls[0] if isinstance(cls, tuple) else cls
        self.add_section(Section(nested_key, cls=base, subclasses=True, required=required))

    def add_lightning_class_args(
        self, lightning_class: Any, nested_key: str, subclass_mode: bool = False, required: bool = True
    ) -> None:
        """A callback, which the trainer gets; or another object, in `cli.config_init`."""
        from trainyard.callbacks.base import Callback

        if isinstance(lightning_class, type) and issubclass(lightning_class, Callback):
            self.callback_keys.append(nested_key)
        self.add_section(
            Section(
                nested_key, cls=lightning_class, subclasses=subclass_mode, required=subclass_mode and required
            )
        )

    def add_optimizer_args(
        self, optimizer_class: Any = None, nested_key: str = "optimizer", link_to: str = "AUTOMATIC"
    ) -> None:
        """An optimizer of the model's parameters: of this class, or, by default, of any that the configuration names."""
        from torch.optim import Optimizer

        self.optimizer_keys.append(nested_key)
        self._add_of_torch(optimizer_class or Optimizer, Optimizer, nested_key, "params", ())

    def add_lr_scheduler_args(
        self, lr_scheduler_class: Any = None, nested_key: str = "lr_scheduler", link_to: str = "AUTOMATIC"
    ) -> None:
        """A scheduler of that optimizer; its arguments may have `interval`, `frequency`, `monitor`, `strict`, `name`."""
        from torch.optim.lr_scheduler import LRScheduler

        self.scheduler_keys.append(nested_key)
        extra = ("interval", "frequency", "monitor", "strict", "name")
        self._add_of_torch(lr_scheduler_class or LRScheduler, LRScheduler, nested_key, "optimizer", extra)

    def _add_of_torch(self, cls: Any, base: Any, key: str, fixed: str, extra: tuple[str, ...]) -> None:
        several = isinstance(cls, tuple) or cls is base
        self.add_section(
            Section(key, cls=base if several else cls, subclasses=several, fixed=(fixed,), extra=extra)
        )

    def set_defaults(self, *args: Config, **kwargs: Any) -> None:
        """Of arguments, by their dotted names."""
        for given in (*args, kwargs):
            for key, value in given.items():
                self._defaults = _with(self._defaults, key.split("."), value)

    def link_arguments(
        self, source: str | tuple[str, ...], target: str, compute_fn: Callable[..., Any] | None = None,
        apply_on: str = "parse",
    ) -> None:  # fmt: skip
        """`target` gets the value of `source`, or what `compute_fn` makes of it. With apply_on="instantiate" it is an
        attribute of an object that is made before, as "data.num_classes"."""
        if apply_on not in ("parse", "instantiate"):
            raise ValueError(f"apply_on: {apply_on!r} is neither 'parse' nor 'instantiate'")
        sources = (source,) if isinstance(source, str) else tuple(source)
        self.links.append(Link(sources, target, compute_fn, apply_on == "instantiate"))

    # ---- from words to a configuration

    @property
    def class_sections(self) -> tuple[str, ...]:
        return tuple(s.key for s in self.sections.values() if s.subclasses)

    def arguments(self, argv: Sequence[str]) -> Arguments:
        return parse(argv, tuple(self.sections))

    def config(self, arguments: Arguments, verb: str) -> Config:
        """Defaults, files in their order, overrides. Raises CliError."""
        config = self._defaults
        for path in arguments.configs:
            config = merge(config, load(path, verb, self.verbs, tuple(self.sections)))
        return override(config, arguments.overrides, self.class_sections)

    def check_names(self, config: Config) -> None:
        for key in config:
            if key not in self.sections:
                raise CliError(f"there is no section {key!r}{nearest(str(key), self.sections)}")

    def link(self, config: Config, made: Any = None) -> Config:
        """With what links say of values (`made` None), or of objects."""
        for link in self.links:
            if link.late != (made is not None):
                continue
            values = [_get(config if made is None else made, s.split(".")) for s in link.source]
            if any(v is _MISSING for v in values):
                if made is not None:
                    raise CliError(f"{', '.join(link.source)} is linked to {link.target}, and is not there")
                continue
            value = values[0] if link.compute is None else link.compute(*values)
            config = self._put(config, link.target, value)
        return config

    def _put(self, config: Config, target: str, value: Any) -> Config:
        section, *rest = target.split(".")
        if section in self.class_sections and rest and rest[0] not in (CLASS, ARGUMENTS):
            rest = [ARGUMENTS, *rest]
        linked: Config = _with(config, [section, *rest], value)
        return linked

    def describe(self, config: Config) -> Config:
        """The whole configuration with its defaults. Raises CliError for all that is wrong in it."""
        self.check_names(config)
        late = {link.target for link in self.links if link.late}
        return {
            key: self._describe(section, config.get(key), tuple(t for t in late if t.startswith(f"{key}.")))
            for key, section in self.sections.items()
        }

    def _describe(self, section: Section, value: Any, late: tuple[str, ...]) -> Any:
        key = section.key
        try:
            if section.cls is None:
                return writable(
                    convert(section.default if value is None else value, section.hint, key, describe)
                )
            fixed = (*section.fixed, *(t.rpartition(".")[2] for t in late))
            if not section.subclasses:
                given = _mapping(value, key)
                check_required(section.cls, given, key, fixed)
                return describe_arguments(section.cls, given, key, fixed=fixed, closed=section.closed)
            if value is None:
                if section.required:
                    raise CliError(
                        f"{key}: say which: {key}.class_path in a configuration, or --{key} package.Class"
                    )
                return None
            cls, given = class_of(value, section.cls, key)
            extra = {k: given.pop(k) for k in section.extra if k in given and k not in _names(cls)}
            check_required(cls, given, key, fixed)
            arguments = describe_arguments(cls, given, key, fixed=fixed)
            from trainyard.cli.classes import path_of

            return {
                CLASS: path_of(cls),
                ARGUMENTS: {**arguments, **{k: writable(v) for k, v in extra.items()}},
            }
        except ConversionError as error:
            raise CliError(f"{error.place}: {error.problem}") from None


def _names(cls: Any) -> set[str]:
    from trainyard.utilities.hints import parameters_of

    return {p.name for p in parameters_of(cls)}


def _mapping(value: Any, key: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CliError(f"{key}: {value!r} is no mapping of arguments")
    return value


def _with(config: Any, parts: list[str], value: Any) -> Any:
    head, *rest = parts
    node = config if isinstance(config, dict) else {}
    return {**node, head: _with(node.get(head), rest, value) if rest else value}


def _get(node: Any, parts: list[str]) -> Any:
    """An entry of mappings or an attribute of objects; _MISSING. init_args may be left out."""
    for part in parts:
        if isinstance(node, dict):
            if part not in node and ARGUMENTS in node:
                node = node[ARGUMENTS] or {}
            node = node.get(part, _MISSING)
        else:
            node = getattr(node, part, _MISSING)
        if node is _MISSING:
            return _MISSING
    return node
