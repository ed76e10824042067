"""Configurations: nested dicts from YAML files, merged, with overrides."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from trainyard.cli.arguments import Override
from trainyard.cli.errors import CliError
from trainyard.utilities.hints import nearest
from trainyard.utilities.yaml import YamlError, parse

Config = dict[str, Any]
CLASS, ARGUMENTS = "class_path", "init_args"


def load(path: str, verb: str, verbs: Collection[str], sections: Collection[str]) -> Config:
    """One file. Its top level has sections, or verbs with sections. Raises CliError that names file and line."""
    file = Path(path).expanduser()
    try:
        config: Config | None = parse(file.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        raise CliError(f"--config: {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"--config: {path} cannot be read: {error}") from None
    except YamlError as error:
        raise CliError(f"--config: {error}") from None
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise CliError(f"--config: {path} holds a {type(config).__name__}, not a mapping of sections")
    if config and all(key in verbs for key in config):
        config = config.get(verb) or {}
    config = dict(config)
    for key in config:
        if key not in sections:
            raise CliError(f"--config: {path}: there is no section {key!r}{nearest(str(key), sections)}")
    return config


def merge(base: Config, other: Config) -> Config:
    """`other` over `base`: mappings entry by entry, all else whole. Arguments of another class do not stay."""
    merged = dict(base)
    for key, value in other.items():
        old = merged.get(key)
        if isinstance(old, str) and isinstance(value, dict) and CLASS not in value:
            old = {CLASS: old}
        if isinstance(old, dict) and isinstance(value, dict):
            if CLASS in value and CLASS in old and value[CLASS] != old[CLASS]:
                merged[key] = value
            else:
                merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def override(config: Config, changes: Sequence[Override], classes: Collection[str]) -> Config:
    """Apply overrides in their order. `classes`: the sections that are class_path and init_args, in which
    `--model.lr` means `model.init_args.lr`. Raises CliError."""
    config = _copy(config)
    for change in changes:
        section, *rest = change.key.split(".")
        if not rest:
            config[section] = _leaf(config.get(section), change, is_class=section in classes)
            continue
        config[section] = _set(config.get(section), rest, change, is_class=section in classes)
    return config


def _set(node: Any, parts: list[str], change: Override, *, is_class: bool) -> Any:
    """`node` with the value at `parts` below it."""
    if isinstance(node, str) and not is_class:
        is_class = True  # --trainer.logger CSVLogger --trainer.logger.save_dir logs
    if isinstance(node, str):
        node = {CLASS: str(node)}
    if isinstance(node, list):
        return _set_in_list(node, parts, change)
    if node is None:
        node = {}
    if not isinstance(node, dict):
        raise CliError(f"--{change.key}: {node!r} has no parts")
    head, *rest = parts
    if (is_class or CLASS in node) and head not in (CLASS, ARGUMENTS):
        inner = _set(node.get(ARGUMENTS), parts, change, is_class=False)
        return {**node, ARGUMENTS: inner}
    if rest:
        return {**node, head: _set(node.get(head), rest, change, is_class=False)}
    if head == CLASS:
        return _leaf(node, change, is_class=True)
    return {**node, head: _leaf(node.get(head), change, is_class=False)}


def _set_in_list(node: list[Any], parts: list[str], change: Override) -> list[Any]:
    """At an index, or in the entry that was added last."""
    if not node:
        raise CliError(f"--{change.key}: the list is empty; add an entry with +=")
    head, rest = (int(parts[0]), parts[1:]) if parts[0].isdigit() else (len(node) - 1, parts)
    if head >= len(node):
        raise CliError(f"--{change.key}: the list has {len(node)} entries")
    entry = (
        _set(node[head], rest, change, is_class=False) if rest else _leaf(node[head], change, is_class=False)
    )
    return [*node[:head], entry, *node[head + 1 :]]


def _leaf(old: Any, change: Override, *, is_class: bool) -> Any:
    if change.append:
        kept = old if isinstance(old, list) else [] if old is None else [old]
        try:
            value = parse(str(change.value))
        except YamlError:
            value = str(change.value)
        return [*kept, *(value if isinstance(value, list) else [value])]
    if not is_class:
        return change.value
    name = str(change.value)
    if name.lstrip().startswith("{"):
        return parse(name)
    same = isinstance(old, dict) and old.get(CLASS) in (None, name)
    return {**(old if same else {}), CLASS: name}


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value
