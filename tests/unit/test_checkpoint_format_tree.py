"""A state becomes JSON and named tensors, and is the same again: types, bits, ties."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainyard.checkpoint.errors import CheckpointConfigError, ShardInvalid
from trainyard.checkpoint.format.tree import flatten, refs, unflatten

DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.uint32, torch.bool,
    torch.complex64, torch.complex128, torch.float8_e4m3fn,
)  # fmt: skip


def there_and_back(value: Any, path: str = "checkpoint") -> Any:
    """As through a file: the skeleton as text, each tensor as bytes."""
    skeleton, tensors = flatten(value, path)
    text = json.dumps(skeleton, allow_nan=False)
    # numel 0 has no bytes; clone() keeps dtype and shape of any.
    copies = {
        name: t.resolve_conj().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()
    }
    wanted = refs(json.loads(text))
    assert {ref.name: (ref.dtype, ref.shape) for ref in wanted} == {
        name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()
    }
    return unflatten(json.loads(text), lambda ref: copies[ref.name])


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        if (a.dtype, a.shape, a.layout) != (b.dtype, b.shape, b.layout):
            return False
        if a.layout is torch.sparse_coo:
            a, b = a.coalesce(), b.coalesce()
            return same(a.indices(), b.indices()) and same(a.values(), b.values())
        return torch.equal(*(t.resolve_conj().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            same(k, j) and same(v, w) for (k, v), (j, w) in zip(a.items(), b.items(), strict=True)
        )
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(v, w) for v, w in zip(a, b, strict=True))
    return bool(a == b)


def tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (count * dtype.itemsize,), generator=generator)
    return raw.to(torch.uint8).view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


tensors = st.builds(
    tensor, st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3).map(tuple), st.integers(0, 9)
)
texts = st.one_of(
    st.text(max_size=6), st.sampled_from(["a.b", "$tensor", "$", "$$x", "", ".", "#2", "a#2", "indices", "0"])
)
texts = texts.filter(lambda t: not any("\ud800" <= c <= "\udfff" for c in t))
plain = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(2**63, 2**90), st.floats(), texts, st.binary(max_size=5),
    st.complex_numbers(), st.sampled_from([-0.0, math.nan, math.inf, -math.inf, complex(-0.0, math.inf), 5e-324]),
)  # fmt: skip
leaves = st.one_of(
    plain,
    tensors,
    st.sampled_from([torch.Size([2, 0, 3]), torch.Size([]), torch.bfloat16, torch.float32, torch.device("cpu"),
                     torch.device("cuda:3")]),
)  # fmt: skip
hashable = st.one_of(
    st.none(), st.booleans(), st.integers(), texts, st.binary(max_size=3), st.floats(allow_nan=False),
    st.tuples(st.integers(), texts),
)  # fmt: skip


def inner(children: Any) -> Any:
    items = st.lists(st.tuples(hashable, children), max_size=4)
    return st.one_of(
        st.lists(children, max_size=4),
        st.lists(children, max_size=3).map(tuple),
        st.dictionaries(texts, children, max_size=4),
        items.map(dict),
        items.map(OrderedDict),
        st.frozensets(hashable, max_size=4).map(set),
        st.dictionaries(hashable, st.integers(), max_size=3).map(Counter),
    )


states = st.recursive(leaves, inner, max_leaves=25)


@settings(max_examples=400, deadline=None)
@given(states)
def test_the_same_comes_back(value: Any) -> None:
    assert same(there_and_back(value), value)


@settings(max_examples=100, deadline=None)
@given(states)
def test_names_depend_on_the_structure_alone_and_begin_with_the_path(value: Any) -> None:
    skeleton, found = flatten(value, "rank-00007")
    again, twice = flatten(value, "rank-00007")
    assert (again, list(twice)) == (skeleton, list(found))
    assert all(name == "rank-00007" or name.startswith(("rank-00007.", "rank-00007#")) for name in found)

    def others(v: Any) -> Any:
        """Of another rank: the same structure, other tensors."""
        if isinstance(v, torch.Tensor):
            return torch.zeros_like(v)
        if isinstance(v, list | tuple) and type(v) in (list, tuple):
            return type(v)(others(w) for w in v)
        return {k: others(w) for k, w in v.items()} if type(v) is dict else v

    # A tensor that hypothesis put there twice is tied in `value`, and is not in the copy.
    if len(found) == len(flatten(others(value), "rank-00007")[1]):
        assert list(flatten(others(value), "rank-00007")[1]) == list(found)


def test_names_can_be_read() -> None:
    skeleton, found = flatten(
        {"state_dict": {"net.0.weight": torch.ones(1)}, "optimizer_states": [{"state": {0: torch.ones(1)}}]}
    )
    assert list(found) == ["checkpoint.state_dict.net.0.weight", "checkpoint.optimizer_states.0.state.0"]
    assert skeleton["state_dict"] == {
        "net.0.weight": {"$tensor": ["checkpoint.state_dict.net.0.weight", "F32", [1]]}
    }


def test_paths_that_look_alike_are_told_apart() -> None:
    value = {
        "a.b": torch.tensor(1),
        "a": {"b": torch.tensor(2)},
        "a.b#2": torch.tensor(3),
        0: torch.tensor(4),
    }
    value |= {"0": torch.tensor(5)}
    assert len(set(flatten(value)[1])) == 5
    assert same(there_and_back(value), value)


def test_tied_weights_are_there_once_and_tied_again() -> None:
    weight = torch.randn(3, 2)
    value = {
        "head": weight,
        "embedding": weight,
        "turned": weight.t(),
        "part": weight[:2],
        "copy": weight.clone(),
    }
    skeleton, found = flatten(value)
    assert set(found) == {f"checkpoint.{name}" for name in ("head", "turned", "part", "copy")}
    back = unflatten(skeleton, lambda ref: found[ref.name])
    assert back["head"] is back["embedding"]
    assert same(there_and_back(value), value)


def test_two_empty_tensors_are_two() -> None:
    value = {"a": torch.empty(0, 2), "b": torch.empty(0, 2)}
    assert set(flatten(value)[1]) == {"checkpoint.a", "checkpoint.b"}


def test_sparse_tensors() -> None:
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[0, 1, 1], [2, 0, 0]]), torch.tensor([3.0, 4.0, 5.0]), (2, 3)
    )
    back = there_and_back({"s": sparse})["s"]
    assert back.layout is torch.sparse_coo
    assert torch.equal(back.to_dense(), sparse.to_dense())
    hybrid = torch.randn(4, 3).to_sparse(1)
    assert same(there_and_back(hybrid), hybrid)
    assert same(there_and_back(torch.zeros(2, 2).to_sparse()), torch.zeros(2, 2).to_sparse())


def test_views_of_complex_tensors() -> None:
    for dtype in (torch.complex64, torch.complex128):
        value = torch.randn(3, 2, dtype=dtype)
        for kind in (value, value.conj(), value.t(), value.conj().imag, value[:0], value.mH):
            assert torch.equal(there_and_back(kind), kind)


def test_a_conjugate_is_not_tied_to_its_tensor() -> None:
    """They lie in the same memory."""
    value = torch.randn(3, dtype=torch.complex64)
    back = there_and_back([value, value.conj(), value.imag, value.conj().imag])
    assert torch.equal(back[0], value)
    assert torch.equal(back[1], value.conj())
    assert torch.equal(back[3], -back[2])
    double = torch.randn(3, dtype=torch.complex128)
    back = there_and_back([double, double.conj()])
    assert torch.equal(back[1], double.conj())


def test_numpy_s_scalars_become_python_s() -> None:
    value = there_and_back({"a": np.float64(0.1), "b": np.int64(3), "c": np.bool_(True), "d": np.array(2.5)})
    assert {k: (type(v), v) for k, v in value.items()} == {
        "a": (float, 0.1), "b": (int, 3), "c": (bool, True), "d": (float, 2.5)
    }  # fmt: skip


class Own:
    pass


class OwnInt(int):
    pass


class OwnDict(dict[str, int]):
    pass


@pytest.mark.parametrize(
    "value",
    [Own(), OwnInt(3), OwnDict(a=1), len, range(3), frozenset({1}), bytearray(b"x"), np.zeros(3),
     np.datetime64("2026-01-01"), {"x": {"y": Own()}}, {Own(): 1}],
    ids=lambda v: type(v).__name__,
)  # fmt: skip
def test_anything_else_is_refused_by_name(value: Any) -> None:
    with pytest.raises(CheckpointConfigError, match=r"checkpoint\.here.* cannot be in a checkpoint"):
        flatten({"here": value})


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (torch.empty(2, device="meta"), "meta"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized"),
        (torch.eye(2).to_sparse_csr(), "sparse_csr"),
        (torch.empty(2, dtype=torch.complex32), "complex32"),
    ],
    ids=["meta", "quantized", "csr", "complex32"],
)
def test_unusual_tensors_are_refused_by_name(value: torch.Tensor, what: str) -> None:
    with pytest.raises(CheckpointConfigError, match=rf"checkpoint\.here: a .*{what}"):
        flatten({"here": value})


def test_a_number_that_could_not_be_read_again_is_refused() -> None:
    for value in (10**4300 - 1, 1 - 10**4300):
        assert there_and_back([value]) == [value]
    for value in (10**4300, -(10**4300)):
        with pytest.raises(CheckpointConfigError, match=r"checkpoint\.a\.0: .* 4300 digits"):
            flatten({"a": [value]})
        with pytest.raises(CheckpointConfigError, match="4300 digits"):
            flatten({value: 1})


@pytest.mark.parametrize("kind", [dict, OrderedDict, Counter])
def test_a_key_with_half_of_a_surrogate_pair_is_refused_by_name(kind: Any) -> None:
    """It would be in the names of tensors, which other readers could not read."""
    with pytest.raises(CheckpointConfigError, match=r"checkpoint\.here: the key 'a\\ud800'") as caught:
        flatten({"here": kind({"a\ud800": 1, 2: 3})})
    str(caught.value).encode()


def test_a_text_with_half_of_a_surrogate_pair_comes_back_or_is_refused() -> None:
    """Names of files may have some (os.fsdecode); two halves one after the other would come back as one character."""
    assert there_and_back(["caf\udce9", "\U0001f600"]) == ["caf\udce9", "\U0001f600"]
    with pytest.raises(CheckpointConfigError, match=r"checkpoint\.a: the text"):
        flatten({"a": "\ud83d\ude00"})


def test_endless_nesting_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(CheckpointConfigError, match="levels"):
        flatten(value)
    skeleton: Any = 1
    for _ in range(300):
        skeleton = [skeleton]
    with pytest.raises(ShardInvalid, match="deep"):
        unflatten(skeleton, lambda ref: None)


@pytest.mark.parametrize(
    "skeleton",
    [
        {"$object": "os.system"}, {"$tensor": 3}, {"$tensor": "a"}, {"$tensor": ["a", "F32"]}, {"$tensor": ["a", "X", [1]]},
        {"$tensor": [1, "F32", [1]]},
        {"$tensor": ["a", "F32", [-1]]}, {"$tensor": ["a", "F32", 3]}, {"$tensor": ["a", ["F32"], []]}, {"$device": 3},
        {"$complex": "12"}, {"$float": "1e5"}, {"$float": 3}, {"$set": [[1]]}, {"$set": 3},
        {"$dict": [[1]]}, {"$dict": {"a": 1}}, {"$dict": [[{"$dict": []}, 1]]}, {"$bytes": "?"}, {"$bytes": "ü"},
        {"$complex": ["1"]}, {"$complex": ["x", "y"]}, {"$size": "ab"}, {"$size": ["1"]},
        {"$dtype": "nn"}, {"$dtype": "float32.x"},
        {"$dtype": 3}, {"$device": "nowhere"}, {"$device": {}}, {"$tuple": 5}, {"$sparse": []}, {"$": 1},
        {"a": 1, "$b": 2}, {"$counter": [[{"$tuple": [[]]}, 1]]}, {"$complex128": 3}, {"$sparse": [1, 2, 3]},
        {"$float": ["nan"]}, {"$bytes": None}, {"$dtype": None}, {"$size": None}, {"$tuple": {"a": 1}}, {"$tuple": "ab"},
        {"$set": "ab"}, {"$odict": ["ab"]}, {"$size": [True]}, {"$size": [-1]},
    ],
    ids=json.dumps,
)  # fmt: skip
def test_a_skeleton_that_flatten_never_makes_is_refused(skeleton: Any) -> None:
    with pytest.raises(ShardInvalid, match="skeleton"):
        unflatten({"deep": [skeleton]}, lambda ref: torch.ones(2))


def test_a_tensor_is_of_one_shape() -> None:
    skeleton = [{"$tensor": ["a", "F32", [1]]}, {"$tensor": ["a", "F32", [2]]}]
    with pytest.raises(ShardInvalid, match="twice"):
        refs(skeleton)
    assert len(refs([skeleton[0], skeleton[0]])) == 1
