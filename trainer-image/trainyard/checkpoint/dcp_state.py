"""States as `torch.distributed.checkpoint` cuts them up ({dotted name: value} and {dotted name: path}), to and from ours.

DCP pickles what is not a tensor. Here it is a skeleton, or refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainyard.checkpoint.errors import CheckpointConfigError, ShardInvalid
from trainyard.checkpoint.format.dtypes import to_name
from trainyard.checkpoint.format.tree import Ref, flatten, unflatten
from trainyard.checkpoint.reader import CheckpointReader

if TYPE_CHECKING:
    import torch

Path = tuple[str | int, ...]
Shape = tuple[int, ...]

MARK = "dcp"
"""A tree of this name in the first shard says that names are DCP's, without "checkpoint." before them."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """Stands in a nested state for what has a skeleton already."""

    skeleton: Any


def tensor_leaf(name: str, dtype: torch.dtype, shape: Shape) -> Leaf:
    """Raises CheckpointConfigError for a dtype that the format has not."""
    known = to_name(dtype)
    if known is None:
        raise CheckpointConfigError(f"{name}: a tensor of {dtype} cannot be in a checkpoint")
    return Leaf({"$tensor": [name, known, list(shape)]})


def value_leaf(name: str, value: Any) -> Leaf:
    """Raises CheckpointConfigError for anything but primitives, and lists, tuples, sets and dicts of them."""
    skeleton, tensors = flatten(value, name)
    if tensors:
        raise CheckpointConfigError(
            f"{next(iter(tensors))}: a tensor in a {type(value).__name__}, which torch.distributed.checkpoint would pickle as "
            "a whole; put it into a dict or a list"
        )
    return Leaf(skeleton)


def nested(leaves: Mapping[str, Leaf], paths: Mapping[str, Path]) -> Any:
    """The skeleton of the state whose leaves these are. A leaf without a path is at the top, under its name."""
    from torch.distributed.checkpoint._traverse import set_element

    state: dict[str, Any] = {}
    for name, leaf in leaves.items():
        set_element(state, paths.get(name, (name,)), leaf)
    return _skeleton(state)


def _skeleton(node: Any) -> Any:
    if isinstance(node, Leaf):
        return node.skeleton
    if isinstance(node, list):
        return [_skeleton(value) for value in node]
    if isinstance(node, dict):
        if any(key.startswith("$") for key in node):
            return {"$dict": [[key, _skeleton(value)] for key, value in node.items()]}
        return {key: _skeleton(value) for key, value in node.items()}
    return None  # a place in a list that nobody has filled


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """A checkpoint as DCP sees it."""

    tensors: dict[str, Ref]
    """By DCP's name: several may be of one tensor (tied weights)."""
    values: dict[str, Any]
    paths: dict[str, Path]


def contents(reader: CheckpointReader) -> Contents:
    """Of any checkpoint, whether DCP or the Trainer wrote it. A tensor that is made of several (sparse, complex128) is left
    out. Raises ShardInvalid, StoreError."""
    from torch.distributed.checkpoint._nested_dict import flatten_state_dict

    headers = reader.headers()
    main = unflatten(reader.tree("checkpoint"), _meta)
    if MARK in headers[0].trees:
        if not isinstance(main, dict):
            raise ShardInvalid(f"step {reader.record.step}: the checkpoint is no dict")
        state = main
        for rank in range(reader.record.world_size):
            _add_own(state, unflatten(reader.tree("rank", rank), _meta))
    else:
        state = {"checkpoint": main}
        for rank in range(reader.record.world_size):
            state[f"rank-{rank:05d}"] = unflatten(reader.tree("rank", rank), _meta)
    try:
        flat, paths = flatten_state_dict(state)
    except ValueError as error:  # two leaves with one dotted name
        raise ShardInvalid(f"step {reader.record.step}: {error}") from error
    tensors: dict[str, Ref] = {}
    values: dict[str, Any] = {}
    for name, value in flat.items():
        if not hasattr(value, "is_meta"):
            values[name] = value
        elif hasattr(value, "ref"):
            tensors[name] = value.ref
    return Contents(tensors=tensors, values=values, paths=dict(paths))


def own_values(values: Mapping[str, Any], paths: Mapping[str, Path]) -> Any:
    """The "rank" skeleton of a shard: values that rank 0 does not have."""
    return [
        [list(paths.get(name, (name,))), value_leaf(name, value).skeleton] for name, value in values.items()
    ]


def _add_own(state: dict[str, Any], own: Any) -> None:
    """A path may only lead where nothing is: through dicts, not into lists, whose length a path would decide."""
    if not isinstance(own, list):
        raise ShardInvalid("rank: no list of values")
    for each in own:
        if not isinstance(each, list) or len(each) != 2 or not isinstance(each[0], list) or not each[0]:
            raise ShardInvalid("rank: no list of values")
        *way, last = map(str, each[0])
        node: Any = state
        for key in way:
            node = node.setdefault(key, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last in node:
            raise ShardInvalid(
                f"rank: {'.'.join([*way, last])[:100]!r} is there twice, or inside of what is no dict"
            )
        node[last] = each[1]


def _meta(ref: Ref) -> Any:
    """A tensor without content, so that DCP's own functions take it for one. Raises ShardInvalid for a shape that cannot be."""
    import torch

    try:
        tensor: Any = torch.empty(ref.shape, dtype=ref.dtype, device="meta")
    except (RuntimeError, OverflowError, TypeError) as error:
        raise ShardInvalid(f"{ref.name[:100]}: no tensor has the shape {list(ref.shape)[:8]}") from error
    tensor.ref = ref
    return tensor
