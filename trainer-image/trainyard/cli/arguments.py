"""From argv to configuration files and overrides."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainyard.cli.errors import CliError
from trainyard.utilities.convert import Text


@dataclass(slots=True)
class Override:
    """`--trainer.max_epochs 3`, or `--trainer.callbacks+=EarlyStopping`."""

    key: str
    value: Any
    append: bool = False


@dataclass(slots=True)
class Arguments:
    configs: list[str] = field(default_factory=list)
    overrides: list[Override] = field(default_factory=list)
    help: bool = False
    print_config: bool = False


_FLAGS = {"--help": "help", "-h": "help", "--print_config": "print_config", "--print-config": "print_config"}


def parse(argv: Sequence[str], sections: Collection[str]) -> Arguments:
    """`sections`: what an override may begin with. Raises CliError."""
    from trainyard.utilities.hints import nearest

    found = Arguments()
    for name, value in _pairs(argv):
        if name in _FLAGS:
            setattr(found, _FLAGS[name], True)
            continue
        key, append = name[2:].removesuffix("+"), name.endswith("+")
        if key in ("config", "c"):
            if value is None:
                raise CliError("--config: the name of a file is missing")
            found.configs.append(value)
            continue
        section = key.partition(".")[0]
        if section not in sections:
            known = [f"--{known}" for known in ("config", *sections)]
            raise CliError(f"{name}: no such argument{nearest(f'--{section}', known)}")
        found.overrides.append(Override(key, Text("true" if value is None else value), append))
    return found


def _pairs(argv: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """(--name, value): `--name value`, `--name=value`, or `--name` alone. Raises CliError for what is neither."""
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "-c":
            word = "--config"
        if not word.startswith("--") and word not in _FLAGS:
            raise CliError(f"{word!r}: an argument is --name value, as --trainer.max_epochs 3")
        name, equals, value = word.partition("=")
        if equals:
            yield name, value
        elif name in _FLAGS or not rest or _is_name(rest[0]):
            yield name, None
        else:
            yield name, rest.pop(0)


def _is_name(word: str) -> bool:
    return (word.startswith("--") and len(word) > 2) or word in _FLAGS
