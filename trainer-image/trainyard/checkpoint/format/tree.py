"""A state of nested dicts, lists and tensors as a JSON skeleton and named tensors, and back. Nothing is ever pickled.

In the skeleton JSON's own kinds stand for themselves; all else is an object with one key that begins with "$":
`{"$tensor": [name, dtype, shape of the whole]}`, `{"$tuple": [...]}`,
`{"$dict": [[key, value], ...]}` (keys that are not plain strings), ...
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainyard.checkpoint.errors import CheckpointConfigError, ShardInvalid
from trainyard.checkpoint.format.dtypes import from_name, to_name

if TYPE_CHECKING:
    import torch

_LONGEST = 1 << 48
"""A dimension: one that is longer is in no tensor, though one with nothing in it could claim to be."""
_DEEPEST = 200
"""Levels: a skeleton that is deeper did not come from `flatten`."""
_MOST_DIGITS = 4300
"""Of a whole number: Python reads no longer ones from text (`sys.set_int_max_str_digits`)."""
_BEYOND = 10**_MOST_DIGITS


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor that a skeleton needs."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of the whole tensor."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def flatten(value: Any, path: str = "checkpoint") -> tuple[Any, dict[str, torch.Tensor]]:
    """(skeleton, {name: tensor}): names are dotted paths that begin with `path`; values are the tensors themselves, not
    copied, detached. A tensor that is there twice (tied weights) has one name.

    The same structure gives the same names, on any rank. Raises CheckpointConfigError that names what cannot be saved.
    """
    return (flattener := _Flattener()).node(value, path, 0), flattener.tensors


class _Flattener:
    def __init__(self) -> None:
        import torch

        self.tensors: dict[str, torch.Tensor] = {}
        self._names: dict[Any, str] = {}
        self._first: dict[int, str] = {}
        """By address: the first tensor there. Few have company, so only those are compared by all of `_where`."""
        self._usual = (torch.Tensor, torch.nn.Parameter)
        self._torch = torch

    def node(self, value: Any, path: str, depth: int) -> Any:
        torch = self._torch
        if depth > _DEEPEST:
            raise CheckpointConfigError(f"{path[:200]}: nested more than {_DEEPEST} levels deep")
        kind = type(value)
        if kind in self._usual:
            return self._tensor(value, path)
        if value is None or kind is bool:
            return value
        if kind is int:
            if not -_BEYOND < value < _BEYOND:
                raise CheckpointConfigError(
                    f"{path}: a whole number of more than {_MOST_DIGITS} digits cannot be in a checkpoint"
                )
            return value
        if kind is str:
            return value if value.isascii() else _text(value, path)
        if kind is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if kind is dict:
            return self._dict(value, path, depth)
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if isinstance(value, OrderedDict | Counter):
            return self._dict(value, path, depth)
        if kind is list:
            return [self.node(v, f"{path}.{i}", depth + 1) for i, v in enumerate(value)]
        if kind is torch.Size:
            return {"$size": list(value)}
        if kind in (tuple, set):
            return {
                f"${kind.__name__}": [self.node(v, f"{path}.{i}", depth + 1) for i, v in enumerate(value)]
            }
        if kind is bytes:
            return {"$bytes": base64.b64encode(value).decode()}
        if kind is complex:
            return {"$complex": [repr(value.real), repr(value.imag)]}
        if kind in (torch.dtype, torch.device):
            return {f"${kind.__name__}": str(value).removeprefix("torch.")}
        if kind.__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
            return self.node(value.item(), path, depth)
        raise CheckpointConfigError(
            f"{path}: a {kind.__module__}.{kind.__qualname__} cannot be in a checkpoint, which holds tensors "
            "and primitives only; save a tensor, a number, a string, or a list or dict of those"
        )

    def _dict(self, value: Any, path: str, depth: int) -> Any:
        plain = True
        for key in value:
            if type(key) is not str:
                plain = False
            elif not key.isascii() and not _utf8(key):
                raise CheckpointConfigError(
                    f"{path}: the key {key[:100]!a} has half of a surrogate pair, and cannot be in a checkpoint"
                )
            elif key[:1] == "$":
                plain = False
        if type(value) is dict and plain:
            return {k: self.node(v, f"{path}.{k}", depth + 1) for k, v in value.items()}
        pairs = [
            [self.node(k, f"{path} (key)", depth + 1), self.node(v, f"{path}.{k}", depth + 1)]
            for k, v in value.items()
        ]
        kind = type(value)
        return {"$odict" if kind is OrderedDict else "$counter" if kind is Counter else "$dict": pairs}

    def _tensor(self, value: torch.Tensor, path: str) -> Any:
        torch = self._torch
        if value.requires_grad:
            value = value.detach()
        if (
            type(value) in self._usual and value.layout is torch.strided and (value.is_cpu or value.is_cuda)
            and value.dtype is not torch.complex128 and to_name(value.dtype) is not None
        ):  # fmt: skip
            return self._strided(value, path)
        from torch.distributed.tensor import DTensor

        if isinstance(value, DTensor):
            # The storage itself, not its address: a rank without elements of tied weights names them as the others do.
            return self._ref(value, path, (*_where(value.to_local()), value.shape, value.placements))
        if value.layout is torch.sparse_coo:
            value = value.coalesce()
            parts = [
                self._tensor(value.indices(), f"{path}.indices"),
                self._tensor(value.values(), f"{path}.values"),
            ]
            return {"$sparse": [*parts, list(value.shape)]}
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            what = "meta" if value.is_meta else "quantized" if value.is_quantized else str(value.layout)
            raise CheckpointConfigError(f"{path}: a {what} tensor cannot be in a checkpoint")
        if value.dtype is torch.complex128:
            return {"$complex128": self._tensor(torch.view_as_real(value.resolve_conj().resolve_neg()), path)}
        if to_name(value.dtype) is None:
            raise CheckpointConfigError(f"{path}: a tensor of {value.dtype} cannot be in a checkpoint")
        return self._strided(value, path)

    def _strided(self, value: torch.Tensor, path: str) -> Any:
        if not value.numel():
            return self._ref(value, path, None)
        if not (value.is_cpu or value.is_cuda):
            return self._ref(value, path, _where(value))
        address = value.data_ptr()
        first = self._first.get(address)
        if first is None:
            name = self._first[address] = self._name(value, path, None)
            return {"$tensor": [name, to_name(value.dtype), list(value.shape)]}
        self._names.setdefault(_where(self.tensors[first]), first)
        return self._ref(value, path, _where(value))

    def _ref(self, value: torch.Tensor, path: str, same: Any) -> Any:
        return {"$tensor": [self._name(value, path, same), to_name(value.dtype), list(value.shape)]}

    def _name(self, value: torch.Tensor, path: str, same: Any) -> str:
        if same is not None and same in self._names:
            return self._names[same]
        name, number = path, 1
        while name in self.tensors:
            number += 1
            name = f"{path}#{number}"
        self.tensors[name] = value
        if same is not None:
            self._names[same] = name
        return name


def _where(value: torch.Tensor) -> tuple[Any, ...]:
    """Equal for two tensors that are the same elements of the same memory, read in the same way."""
    return (
        value.untyped_storage()._cdata, value.storage_offset(), value.dtype, value.shape, value.stride(),
        value.is_conj(), value.is_neg(),
    )  # fmt: skip


def _utf8(text: str) -> bool:
    """False: it has halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(value: str, path: str) -> str:
    """Raises CheckpointConfigError for a text that JSON would give back as another: it joins halves of surrogate pairs."""
    if not _utf8(value) and json.loads(json.dumps(value)) != value:
        raise CheckpointConfigError(f"{path}: the text {value[:100]!a} has a surrogate pair in two halves")
    return value


def refs(skeleton: Any) -> list[Ref]:
    """The tensors that it needs, each once. Raises ShardInvalid."""
    found: dict[str, Ref] = {}

    def note(ref: Ref) -> None:
        if found.setdefault(ref.name, ref) != ref:
            raise ShardInvalid(f"skeleton: {ref.name[:100]!r} is there twice, with another shape")

    unflatten(skeleton, note)
    return list(found.values())


def unflatten(skeleton: Any, tensor: Callable[[Ref], Any]) -> Any:
    """The state; `tensor` is asked for each tensor, again for one that is there twice. Where it answers None (they are
    only counted), None stands. Raises ShardInvalid for what `flatten` never makes; runs nothing of it."""
    return _build(skeleton, tensor, 0)


def _build(node: Any, tensor: Callable[[Ref], Any], depth: int) -> Any:
    if depth > _DEEPEST:
        raise ShardInvalid("skeleton: too deep")
    if node is None or isinstance(node, bool | int | str | float):
        return node
    if isinstance(node, list):
        return [_build(v, tensor, depth + 1) for v in node]
    if len(node) == 1 and (kind := next(iter(node))).startswith("$"):
        try:
            if kind == "$tensor":
                return tensor(_ref(node[kind]))
            return _special(kind, node[kind], tensor, depth + 1)
        except (TypeError, ValueError, AttributeError, KeyError, RuntimeError, binascii.Error) as error:
            raise ShardInvalid(f"skeleton: a bad {kind[:20]}: {type(error).__name__}") from error
    if any(key.startswith("$") for key in node):
        raise ShardInvalid("skeleton: an object with keys that begin with $")
    return {key: _build(v, tensor, depth + 1) for key, v in node.items()}


def _special(kind: str, given: Any, tensor: Callable[[Ref], Any], depth: int) -> Any:
    import torch

    match kind:
        case "$float" if given in ("nan", "inf", "-inf"):
            return float(given)
        case "$tuple":
            return tuple(_build(v, tensor, depth) for v in _list(given))
        case "$set":
            return {_build(v, tensor, depth) for v in _list(given)}
        case "$dict" | "$odict" | "$counter":
            pairs = [
                (_build(k, tensor, depth), _build(v, tensor, depth)) for k, v in map(_list, _list(given))
            ]
            if kind == "$counter":
                return Counter(dict(pairs))
            return OrderedDict(pairs) if kind == "$odict" else dict(pairs)
        case "$bytes":
            return base64.b64decode(given, validate=True)
        case "$complex":
            real, imaginary = _list(given)
            return complex(float(real), float(imaginary))
        case "$size":
            return torch.Size(_lengths(given))
        case "$dtype":
            return _dtype(given)
        case "$device" if isinstance(given, str):
            return torch.device(given)
        case "$sparse":
            indices, values, shape = _list(given)
            parts = _build(indices, tensor, depth), _build(values, tensor, depth)
            if parts[0] is None or parts[1] is None:
                return None
            return torch.sparse_coo_tensor(*parts, size=_lengths(shape), check_invariants=True).coalesce()
        case "$complex128":
            real_pairs = _build(given, tensor, depth)
            return None if real_pairs is None else torch.view_as_complex(real_pairs)
    raise ShardInvalid(f"skeleton: {kind[:20]!r} is unknown")


def _ref(given: Any) -> Ref:
    name, dtype, shape = _list(given)
    known = from_name(dtype)
    if not isinstance(name, str) or known is None:
        raise ValueError("no reference to a tensor")
    return Ref(name, known, tuple(_lengths(shape)))


def _list(given: Any) -> list[Any]:
    """Not a string or an object, which can be iterated, too."""
    if not isinstance(given, list):
        raise TypeError("not a list")
    return given


def _lengths(given: Any) -> list[int]:
    if any(type(n) is not int or not 0 <= n < _LONGEST for n in _list(given)):
        raise ValueError("not a shape")
    return given  # type: ignore[no-any-return]


def _dtype(name: str) -> torch.dtype:
    import torch

    found = getattr(torch, name) if name.isidentifier() else None
    if not isinstance(found, torch.dtype):
        raise TypeError("no dtype")
    return found
