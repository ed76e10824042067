"""YAML as people write it in configurations. PyYAML is imported here, when it is used."""

from __future__ import annotations

import functools
import re
from collections.abc import Hashable
from typing import Any

from trainyard.utilities.optional import require


class YamlError(ValueError):
    """One line, with the place in the file."""


def parse(text: str, name: str = "") -> Any:
    """Raises YamlError. As YAML 1.2 has it, `1e-3` is a number and `no` is a string; a key may stand once."""
    yaml = require("yaml", "cli", "a YAML file")
    try:
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise YamlError(f"{name or 'YAML'}{place}: {problem}") from None


def dump(data: Any) -> str:
    """Plain data, keys in their order."""
    yaml = require("yaml", "cli", "a YAML file")
    text: str = yaml.dump(data, Dumper=_dumper(), sort_keys=False, allow_unicode=True)
    return text


@functools.cache
def _loader() -> Any:
    yaml = require("yaml", "cli", "a YAML file")

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's name for a table that subclasses replace
            first: [(tag, pattern) for tag, pattern in entries if tag not in _REPLACED]
            for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            seen: set[Any] = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if isinstance(key, Hashable) and key in seen and key_node.tag != "tag:yaml.org,2002:merge":
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key!r} stands twice", key_node.start_mark
                    )
                seen.add(key) if isinstance(key, Hashable) else None
            return super().construct_mapping(node, deep=deep)  # type: ignore[no-any-return]

    for tag, pattern, first in _RESOLVERS:
        Loader.add_implicit_resolver(tag, re.compile(pattern), list(first))
    Loader.add_constructor(
        "tag:yaml.org,2002:python/tuple", lambda loader, node: loader.construct_sequence(node, True)
    )
    return Loader


@functools.cache
def _dumper() -> Any:
    yaml = require("yaml", "cli", "a YAML file")

    class Dumper(yaml.SafeDumper):  # type: ignore[misc, name-defined]
        def ignore_aliases(self, data: Any) -> bool:
            return True

        def increase_indent(self, flow: bool = False, indentless: bool = False) -> Any:
            return super().increase_indent(flow, False)

    Dumper.add_representer(tuple, lambda dumper, data: dumper.represent_list(list(data)))
    Dumper.add_multi_representer(str, lambda dumper, data: dumper.represent_str(str(data)))
    Dumper.add_multi_representer(object, lambda dumper, data: dumper.represent_str(str(data)))
    return Dumper


_REPLACED = {"tag:yaml.org,2002:float", "tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp"}
_RESOLVERS = (
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    (
        "tag:yaml.org,2002:float",
        r"^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
)
