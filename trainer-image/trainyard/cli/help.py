"""What --help prints: the arguments of the chosen classes, with their types, defaults and docstrings' words."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from trainyard.cli.build import class_of, writable
from trainyard.cli.classes import path_of
from trainyard.cli.config import Config
from trainyard.cli.parser import ArgumentParser, Section
from trainyard.cli.trainer_words import WORDS
from trainyard.utilities.convert import ConversionError
from trainyard.utilities.hints import Parameter, parameters_of, type_name

_WIDTH = 110


def verbs_help(prog: str, verbs: Mapping[str, str]) -> str:
    """For the command alone."""
    lines = [f"usage: {prog} VERB [--config FILE]... [--SECTION.ARGUMENT VALUE]...", ""]
    width = max(map(len, verbs))
    lines += [f"  {verb:<{width}}  {words}" for verb, words in verbs.items()]
    return "\n".join([*lines, "", f"{prog} VERB --help says what each takes."])


def sections_help(name: str, parser: ArgumentParser, config: Config) -> str:
    """For a verb; of the classes that `config` names, also their arguments."""
    lines = [
        f"usage: {name} [--config FILE]... [--SECTION.ARGUMENT VALUE]...",
        "",
        "  --config FILE     a YAML file with the sections below; several are merged, the last one counts",
        "  --print_config    print the whole configuration that this command has, and do nothing",
        "  --help            this, with the arguments of the classes that the configuration names",
    ]
    for section in parser.sections.values():
        lines += ["", *_section(section, config.get(section.key))]
    return "\n".join(lines)


def _section(section: Section, value: Any) -> Iterator[str]:
    key = section.key
    if section.cls is None:
        yield f"  --{key}  ({type_name(section.hint)}, default: {_shown(section.default)})"
        yield from _words(section.doc)
        return
    if not section.subclasses:
        yield f"{key}: {path_of(section.cls)}"
        yield from _arguments(section.cls, key, section.fixed)
        return
    yield f"{key}: {section.doc or type_name(section.cls)}, as class_path and init_args"
    yield f"  --{key} CLASS  (a {type_name(section.cls)}{', required' if section.required else ''})"
    if value is None:
        return
    try:
        cls, _ = class_of(value, section.cls, key)
    except ConversionError as error:
        yield f"  ({error.problem})"
        return
    yield f"{key}: {path_of(cls)}"
    yield from _arguments(cls, key, section.fixed)


def _arguments(cls: Any, key: str, fixed: tuple[str, ...]) -> Iterator[str]:
    for parameter in parameters_of(cls):
        if parameter.name not in fixed:
            yield f"  --{key}.{parameter.name}  ({type_name(parameter.hint)}, {_default(parameter)})"
            yield from _words(parameter.doc or (WORDS.get(parameter.name, "") if key == "trainer" else ""))


def _default(parameter: Parameter) -> str:
    return "required" if parameter.required else f"default: {_shown(parameter.default)}"


def _shown(value: Any) -> str:
    plain = writable(value)
    text = "null" if plain is None else str(plain).lower() if isinstance(plain, bool) else str(plain)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _words(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)
