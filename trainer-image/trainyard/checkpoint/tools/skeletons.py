"""Skeletons with their tensors' references in place: for looking at a checkpoint without reading it."""

from __future__ import annotations

from typing import Any

from trainyard.checkpoint.format.tree import Ref, refs, unflatten


def with_refs(skeleton: Any) -> Any:
    """The state with a `Ref` for each dense tensor, None for a tensor that is made of several (sparse, complex128).

    Raises ShardInvalid.
    """
    refs(skeleton)  # it is no deeper and no stranger than `flatten` makes it
    return unflatten(_plain(skeleton), lambda ref: ref)


def _plain(node: Any) -> Any:
    if isinstance(node, list):
        return [_plain(value) for value in node]
    if isinstance(node, dict):
        if len(node) == 1 and next(iter(node)) in ("$sparse", "$complex128"):
            return None
        return {key: _plain(value) for key, value in node.items()}
    return node


def weights(state: Any) -> dict[str, Ref]:
    """The tensors of `state["state_dict"]`, or all of them by their dotted paths where there is none (what was saved by
    `torch.distributed.checkpoint` is no Lightning checkpoint)."""
    found: dict[str, Ref] = {}
    inner = state.get("state_dict") if isinstance(state, dict) else None
    _collect(inner if isinstance(inner, dict) else state, "", found)
    return found


def _collect(node: Any, path: str, found: dict[str, Ref]) -> None:
    if isinstance(node, Ref):
        found[path] = node
    elif isinstance(node, dict | list | tuple):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            _collect(value, f"{path}.{key}" if path else str(key), found)
