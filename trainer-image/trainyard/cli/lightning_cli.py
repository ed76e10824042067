"""LightningCLI: a script's trainer, module and data from the command line and YAML files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from trainyard.cli import optimizers
from trainyard.cli.build import arguments_of, build, class_of
from trainyard.cli.config import Config
from trainyard.cli.errors import CliError
from trainyard.cli.parser import ArgumentParser, Section
from trainyard.cli.save_config import SaveConfigCallback
from trainyard.errors import MisconfigurationException
from trainyard.utilities.convert import ConversionError
from trainyard.utilities.parsing import AttributeDict
from trainyard_api.contract import Env, ExitCode

VERBS: Mapping[str, str] = {
    "fit": "train",
    "validate": "one epoch of validation",
    "test": "one epoch of test",
    "predict": "run predict_step over the data, for a callback that writes what it returns",
}
"""Methods of the trainer."""
_USAGE = 2
"""Exit code for a command line that is wrong, as argparse's."""


class LightningCLI:
    """`lightning.pytorch.cli.LightningCLI`, without jsonargparse.

    With `model_class` its arguments are the section `model`; without, or with `subclass_mode_model`, the section names a
    class: {class_path, init_args}. Likewise `datamodule_class` and `data`. With `run` the first word of the command line
    is fit, validate, test or predict; without, there are only `cli.trainer`, `cli.model` and `cli.datamodule`. What is
    wrong is said in one line, and ends the process with code 2 (78 in a TrainingRun: a restart would not help).
    """

    def __init__(  # noqa: PLR0917 - Lightning's signature
        self, model_class: type | Callable[..., Any] | None = None, datamodule_class: type | Callable[..., Any] | None = None,
        save_config_callback: type[SaveConfigCallback] | None = SaveConfigCallback,
        save_config_kwargs: Mapping[str, Any] | None = None, trainer_class: Any = None,
        trainer_defaults: Mapping[str, Any] | None = None, seed_everything_default: bool | int = True,
        parser_kwargs: Mapping[str, Any] | None = None, parser_class: type[ArgumentParser] = ArgumentParser,
        subclass_mode_model: bool = False, subclass_mode_data: bool = False,
        args: Sequence[str] | Mapping[str, Any] | None = None, run: bool = True,
        auto_configure_optimizers: bool = True, prog: str | None = None, **_: Any,
    ) -> None:  # fmt: skip
        from trainyard.trainer.trainer import Trainer

        self.model_class, self.datamodule_class = model_class, datamodule_class
        self.trainer_class: Any = trainer_class or Trainer
        self.trainer_defaults = dict(trainer_defaults or {})
        self.seed_everything_default = seed_everything_default
        self.save_config_callback, self.save_config_kwargs = (
            save_config_callback,
            dict(save_config_kwargs or {}),
        )
        self.subclass_mode_model = model_class is None or subclass_mode_model
        self.subclass_mode_data = datamodule_class is None or subclass_mode_data
        self.auto_configure_optimizers = auto_configure_optimizers
        self.prog = prog or os.path.basename(sys.argv[0])  # noqa: PTH119 - of text, not of a file
        self.subcommand: str | None = None
        self.parser = parser_class((*VERBS, "export"))
        try:
            self._read(args, run)
            self.before_instantiate_classes()
            self.instantiate_classes()
            self.after_instantiate_classes()
        except MisconfigurationException as error:
            fail(self._name, error)
        if run:
            self._run()

    # ---- to be overridden

    def add_arguments_to_parser(self, parser: ArgumentParser) -> None:
        """More sections, defaults, links."""

    def before_instantiate_classes(self) -> None: ...
    def after_instantiate_classes(self) -> None: ...

    @staticmethod
    def configure_optimizers(lightning_module: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
        """What the module's configure_optimizers returns for the sections `optimizer` and `lr_scheduler`."""
        return optimizers.combine(lightning_module, optimizer, lr_scheduler)

    # ---- reading

    @property
    def _name(self) -> str:
        return f"{self.prog} {self.subcommand}" if self.subcommand else self.prog

    def _read(self, args: Sequence[str] | Mapping[str, Any] | None, run: bool) -> None:
        given = sys.argv[1:] if args is None else args
        words = [] if isinstance(given, Mapping) else list(given)
        if run:
            self.subcommand = self._verb(words, given)
        self._add_sections(run)
        self.add_arguments_to_parser(self.parser)
        self._add_optimizers()
        parser = self.parser
        arguments = parser.arguments(words)
        config = parser.config(arguments, self.subcommand or "")
        if isinstance(given, Mapping):
            from trainyard.cli.config import merge

            config = merge(config, dict(given.get(str(self.subcommand), given)) if run else dict(given))
            config.pop("subcommand", None)
        if arguments.help:
            self._help(config)
        self._given = parser.link(config)
        self._as_given = parser.describe(self._given)
        self.config = _attributes(self._as_given)
        if arguments.print_config:
            self._print()

    def _verb(self, words: list[str], given: Any) -> str:
        from trainyard.utilities.hints import nearest

        verb = (
            str(given.get("subcommand", "")) if isinstance(given, Mapping) else words.pop(0) if words else ""
        )
        if verb in ("--help", "-h"):
            from trainyard.cli.help import verbs_help

            print(verbs_help(self.prog, VERBS))
            raise SystemExit(0)
        if verb not in VERBS:
            what = f"{verb!r} is none of them" if verb else "the first word is missing"
            raise CliError(
                f"say what to do, {', '.join(VERBS)}: {what}{nearest(verb, VERBS) if verb else ''}"
            )
        return verb

    def _add_sections(self, run: bool) -> None:
        from trainyard.core.datamodule import LightningDataModule
        from trainyard.core.module import LightningModule

        parser = self.parser
        parser.add_section(
            Section("seed_everything", "Seed of all generators; true takes PL_GLOBAL_SEED or 0, false none",
                    hint=bool | int, default=self.seed_everything_default)
        )  # fmt: skip
        parser.add_section(Section("trainer", "The Trainer's arguments", cls=self.trainer_class, closed=True))
        parser.set_defaults({f"trainer.{k}": v for k, v in self.trainer_defaults.items()})
        parser.add_section(
            Section("model", "The module", cls=self.model_class or LightningModule, subclasses=self.subclass_mode_model,
                    required=True)
        )  # fmt: skip
        data = self.datamodule_class or LightningDataModule
        parser.add_section(
            Section("data", "The data module", cls=data, subclasses=self.subclass_mode_data,
                    required=self.datamodule_class is not None)
        )  # fmt: skip
        if run:
            parser.add_section(
                Section("ckpt_path", "A checkpoint to go on from: a path, 'best' or 'last'", hint=str | None)
            )
            parser.add_section(
                Section("weights_only", "false loads checkpoints that hold objects: it runs code of theirs",
                        hint=bool | None)
            )  # fmt: skip

    def _add_optimizers(self) -> None:
        if not self.auto_configure_optimizers:
            return
        if not self.parser.optimizer_keys:
            self.parser.add_optimizer_args()
        if not self.parser.scheduler_keys:
            self.parser.add_lr_scheduler_args()

    def _help(self, config: Config) -> NoReturn:
        from trainyard.cli.help import sections_help

        print(sections_help(self._name, self.parser, config))
        raise SystemExit(0)

    def _print(self) -> NoReturn:
        from trainyard.utilities.yaml import dump

        print(dump(self._as_given), end="")
        raise SystemExit(0)

    # ---- making

    def instantiate_classes(self) -> None:
        """The module, the data module, the trainer; what is linked to one of them is made after it. Raises CliError."""
        from trainyard.reproducibility import seed_everything

        seed = self.config.get("seed_everything")
        if seed is not False and seed is not None:
            seed_everything(None if seed is True else seed, workers=True)
        self.config_init: dict[str, Any] = dict(self.config)
        for key in self._order():
            config = self._given
            late = [link for link in self.parser.links if link.late and link.target.startswith(f"{key}.")]
            if late:
                config = self.parser.link(config, self.config_init)
                self._given = config
            self.config_init[key] = self._make(self.parser.sections[key], config.get(key))
        self.model, self.datamodule = self.config_init["model"], self.config_init["data"]
        self.trainer = self._make_trainer()
        self._configure_optimizers()

    def _order(self) -> list[str]:
        """Sections of objects, what others are linked to first."""
        skipped = {"trainer", *self.parser.optimizer_keys, *self.parser.scheduler_keys}
        keys = [k for k, s in self.parser.sections.items() if s.cls is not None and k not in skipped]
        for _ in keys:
            for link in self.parser.links:
                target = link.target.partition(".")[0]
                for source in (s.partition(".")[0] for s in link.source):
                    if (
                        link.late
                        and source in keys
                        and target in keys
                        and keys.index(source) > keys.index(target)
                    ):
                        keys.remove(source)
                        keys.insert(keys.index(target), source)
        return keys

    def _make(self, section: Section, value: Any) -> Any:
        try:
            if section.subclasses:
                if value is None:
                    return None
                cls, given = class_of(value, section.cls, section.key)
            else:
                cls, given = section.cls, dict(value or {})
        except ConversionError as error:
            raise CliError(f"{error.place}: {error.problem}") from None
        return cls(**arguments_of(cls, given, section.key, make=build))

    def _make_trainer(self) -> Any:
        section = self.parser.sections["trainer"]
        given = dict(self._given.get("trainer") or {})
        arguments = arguments_of(self.trainer_class, given, "trainer", make=build, closed=section.closed)
        extra = [
            self.config_init[key] for key in self.parser.callback_keys if self.config_init[key] is not None
        ]
        if self.save_config_callback is not None and self.subcommand == "fit":
            extra.append(self.save_config_callback(self.parser, self._as_given, **self.save_config_kwargs))
        callbacks = arguments.get("callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
        return self.trainer_class(**{**arguments, "callbacks": [*callbacks, *extra]})

    def _configure_optimizers(self) -> None:
        parser = self.parser
        if not self.auto_configure_optimizers or len(parser.optimizer_keys) != 1 or self.model is None:
            return
        optimizer = optimizers.maker(
            parser.sections[parser.optimizer_keys[0]], self._given.get(parser.optimizer_keys[0])
        )
        scheduler = None
        if len(parser.scheduler_keys) == 1:
            key = parser.scheduler_keys[0]
            scheduler = optimizers.maker(parser.sections[key], self._given.get(key))
        if optimizer is None:
            if scheduler is not None:
                raise CliError(
                    f"{parser.scheduler_keys[0]}: a scheduler needs an {parser.optimizer_keys[0]} section"
                )
            return
        combine = type(self).configure_optimizers
        self.model.configure_optimizers = optimizers.ConfigureOptimizers(
            self.model, optimizer, scheduler, combine
        )

    # ---- running

    def _run(self) -> None:
        verb = str(self.subcommand)
        for moment in ("before", "after"):
            if callable(hook := getattr(self, f"{moment}_{verb}", None)):
                hook()
            if moment == "before":
                self.result = self._call(verb)

    def _call(self, verb: str) -> Any:
        from trainyard.checkpoint.errors import CheckpointError

        options = {k: self.config[k] for k in ("ckpt_path", "weights_only")}
        try:
            return getattr(self.trainer, verb)(self.model, datamodule=self.datamodule, **options)
        except (MisconfigurationException, CheckpointError) as error:
            fail(self._name, error)


def fail(name: str, error: BaseException) -> NoReturn:
    """One line on stderr, and the end of the process."""
    text = " ".join(str(error).split())
    print(f"{name}: error: {text}", file=sys.stderr, flush=True)
    raise SystemExit(int(ExitCode.CONFIG) if os.environ.get(Env.RUN_UID) else _USAGE) from error


def _attributes(value: Any) -> Any:
    if isinstance(value, dict):
        return AttributeDict({k: _attributes(v) for k, v in value.items()})
    return [_attributes(v) for v in value] if isinstance(value, list) else value
