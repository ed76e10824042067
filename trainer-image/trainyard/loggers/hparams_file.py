"""hparams.yaml. Written here, because PyYAML is not among the library's requirements; any YAML 1.1 reader takes it."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainyard.loggers.values import jsonable

NAME = "hparams.yaml"

_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")
_TAKEN = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}
"""Words that YAML 1.1 reads as something else (https://yaml.org/type/bool.html)."""


def write(folder: str | Path, hparams: Mapping[str, Any]) -> None:
    """`<folder>/hparams.yaml`, whole or not at all. Tensors of one element become numbers, other objects texts."""
    path = Path(folder) / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{NAME}.{os.getpid()}")
    temporary.write_text(to_yaml(jsonable(hparams)), encoding="utf-8")
    temporary.replace(path)


def to_yaml(data: Mapping[str, Any]) -> str:
    """Of mappings, lists, numbers, texts and None."""
    return "\n".join(_lines(data, "")) + "\n" if data else "{}\n"


def _lines(value: Any, indent: str) -> list[str]:
    lines: list[str] = []
    entries = (
        [(f"{_scalar(k)}:", v) for k, v in value.items()]
        if isinstance(value, Mapping)
        else [("-", v) for v in value]
    )
    for head, inner in entries:
        if isinstance(inner, (Mapping, list)) and inner:
            lines += [indent + head, *_lines(inner, indent + "  ")]
        else:
            lines.append(f"{indent}{head} {_scalar(inner)}")
    return lines


def _scalar(value: Any) -> str:
    if isinstance(value, float):
        if not math.isfinite(value):
            return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
        text = repr(value)  # 1e-05 is a text to YAML 1.1, 1.0e-05 is a number
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _TAKEN:
        return value
    return json.dumps(value)
