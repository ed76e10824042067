"""Dictionaries whose entries are attributes too."""

from __future__ import annotations

from typing import Any


class AttributeDict(dict[str, Any]):
    """`d.key` is `d["key"]` (`lightning.pytorch.utilities.parsing.AttributeDict`)."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no {name!r}; there is: {', '.join(map(str, self)) or 'nothing'}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(f"no {name!r}") from None

    def __repr__(self) -> str:
        """A line for each entry."""
        width = max((len(str(key)) for key in self), default=0) + 3
        quoted = {f'"{key}":': value for key, value in self.items()}
        return "\n".join(f"{key:<{width}} {value}" for key, value in quoted.items())

    def copy(self) -> AttributeDict:
        return type(self)(self)
