"""The CRD against the dataclasses and against our own rules: described, bounded, closed, small."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainyard_api import contract
from trainyard_api.serde import _fields, encode
from trainyard_api.v1alpha1 import MAX_ATTEMPTS, Spec, Status

Schema = dict[str, Any]
CRD_FILE = Path(__file__).resolve().parents[2] / "crds" / "trainyard.dev_trainingruns.yaml"
CRD = yaml.safe_load(CRD_FILE.read_text(encoding="utf-8"))
(VERSION,) = CRD["spec"]["versions"]
ROOT = VERSION["schema"]["openAPIV3Schema"]
SPEC = ROOT["properties"]["spec"]
STATUS = ROOT["properties"]["status"]


def walk(schema: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    """Every schema with its path, this one included."""
    yield path, schema
    for name, field in schema.get("properties", {}).items():
        yield from walk(field, f"{path}.{name}")
    if "items" in schema:
        yield from walk(schema["items"], f"{path}[]")
    if "additionalProperties" in schema:
        yield from walk(schema["additionalProperties"], f"{path}{{}}")


ALL = dict(walk(ROOT))
FIELDS = {
    path: s for path, s in ALL.items() if not path.endswith(("[]", "{}")) and path not in ("", ".metadata")
}
# The API server says more about these than we could: names of objects, kinds, its own metadata.
STANDARD = {".apiVersion", ".kind", ".metadata.name"}


def at(path: str) -> Schema:
    return ALL[path]


# ---- names ------------------------------------------------------------------------------------------


def test_names() -> None:
    spec, names = CRD["spec"], CRD["spec"]["names"]
    assert CRD["metadata"]["name"] == f"{contract.PLURAL}.{contract.GROUP}"
    assert (spec["group"], VERSION["name"], spec["scope"]) == (contract.GROUP, contract.VERSION, "Namespaced")
    assert (names["kind"], names["plural"]) == (contract.KIND, contract.PLURAL)
    assert names["shortNames"] == ["tr"]
    assert names["categories"] == ["all", "trainyard"]
    assert VERSION["subresources"] == {"status": {}}
    assert VERSION["selectableFields"] == [{"jsonPath": ".status.phase"}]


# ---- our rules --------------------------------------------------------------------------------------


def test_walk_sees_everything() -> None:
    """Guards the tests below: a walk that stopped early would let them pass."""
    assert len(ALL) > 250
    assert (
        ".spec.affinity.podAffinity.preferredDuringSchedulingIgnoredDuringExecution[].podAffinityTerm.topologyKey"
        in ALL
    )
    assert ".status.attempts[].cause.class" in ALL


def test_small() -> None:
    """Client-side apply puts it all into an annotation of at most 256 KiB, as JSON, and every watcher of CRDs loads it."""
    assert len(json.dumps(CRD, separators=(",", ":"))) < 100_000


def test_every_field_is_described() -> None:
    short = {path for path, s in FIELDS.items() if len(s.get("description", "")) < 8}
    assert not short


def test_descriptions_are_sentences() -> None:
    wrong = {p: s["description"] for p, s in FIELDS.items() if not s["description"].endswith(".")}
    wrong |= {p: s["description"] for p, s in FIELDS.items() if not s["description"][0].isupper()}
    assert not {p: d for p, d in wrong.items() if p not in STANDARD}


def test_every_string_is_bounded() -> None:
    strings = {
        p: s for p, s in ALL.items() if s.get("type") == "string" or s.get("x-kubernetes-int-or-string")
    }
    assert not [p for p, s in strings.items() if "maxLength" not in s and p not in STANDARD]


def test_every_list_and_map_is_bounded() -> None:
    assert not [p for p, s in ALL.items() if s.get("type") == "array" and "maxItems" not in s]
    assert not [p for p, s in ALL.items() if "additionalProperties" in s and "maxProperties" not in s]


def test_every_number_of_the_spec_is_bounded() -> None:
    numbers = {p: s for p, s in walk(SPEC, "spec") if s.get("type") in ("integer", "number")}
    assert len(numbers) > 15
    assert not [p for p, s in numbers.items() if not {"minimum", "maximum", "format"} <= set(s)]


def test_numbers_of_the_status_are_not_negative_by_mistake() -> None:
    """loss may be anything, and exit codes below zero are signals; all the rest are counts."""
    numbers = {p: s for p, s in walk(STATUS, "status") if s.get("type") in ("integer", "number")}
    unbounded = {p for p, s in numbers.items() if s.get("minimum") != 0}
    assert unbounded == {"status.loss", "status.rootCause.exitCode", "status.attempts[].cause.exitCode"}


def test_every_list_says_how_it_merges() -> None:
    lists = {p: s for p, s in ALL.items() if s.get("type") == "array"}
    kinds = {p: s.get("x-kubernetes-list-type") for p, s in lists.items()}
    maps = {p: lists[p]["x-kubernetes-list-map-keys"] for p, kind in kinds.items() if kind == "map"}
    assert maps == {".spec.env": ["name"], ".spec.volumes": ["name"], ".status.conditions": ["type"]}
    assert {kind for p, kind in kinds.items() if p not in maps} == {"atomic"}


def test_the_schema_is_closed() -> None:
    for path, schema in ALL.items():
        assert "x-kubernetes-preserve-unknown-fields" not in schema, path
        assert "x-kubernetes-embedded-resource" not in schema, path
        assert "nullable" not in schema, path
        if schema.get("type") == "object" and path != ".metadata":
            known = schema.get("properties") or schema.get("additionalProperties")
            assert known or path in (".spec.volumes[].emptyDir",), f"{path} would drop everything"


@pytest.mark.parametrize(
    "word",
    ["namespace", "namespaces", "namespaceSelector", "hostPath", "hostNetwork", "hostPID", "hostIPC", "nodeName",
     "securityContext", "runtimeClassName", "podTemplate", "initContainers", "mountPropagation", "privileged"],
)  # fmt: skip
def test_dangerous_fields_do_not_exist(word: str) -> None:
    assert not [p for p in FIELDS if p.rpartition(".")[2].lower() == word.lower()]


def test_rules_say_what_to_do() -> None:
    rules = [(p, rule) for p, s in ALL.items() for rule in s.get("x-kubernetes-validations", ())]
    assert len(rules) > 50
    for path, rule in rules:
        assert len(rule.get("message", "")) > 20, path
        assert not rule["message"].endswith("."), path


def test_every_field_of_the_spec_is_immutable_or_known_to_change() -> None:
    guarded = {
        rule["fieldPath"].removeprefix(".")
        for rule in SPEC["x-kubernetes-validations"]
        if "oldSelf" in rule["rule"]
        and f"self.{rule['fieldPath'][1:]} == oldSelf.{rule['fieldPath'][1:]}" in rule["rule"]
    }
    mutable = {"suspend", "restartPolicy", "activeDeadlineSeconds", "ttlSecondsAfterFinished"}
    assert guarded == set(SPEC["properties"]) - mutable
    for name, field in SPEC["properties"].items():
        text = field["description"]
        assert text.endswith("Can be changed at any time." if name in mutable else "Immutable."), name


# ---- the contract -----------------------------------------------------------------------------------


def test_reserved_environment_is_that_of_the_contract() -> None:
    rules = " ".join(r["rule"] for r in at(".spec.env[].name")["x-kubernetes-validations"])
    for name in contract.RESERVED_ENV:
        assert f"'{name}'" in rules
    alternatives = "|".join(contract.RESERVED_ENV_PREFIXES)
    assert f"^({alternatives})" in rules
    assert f"^({alternatives})" in at(".spec.envFrom[].prefix")["x-kubernetes-validations"][0]["rule"]


def test_reserved_paths_are_those_of_the_contract() -> None:
    rule = at(".spec.volumes[].mountPath")["x-kubernetes-validations"][1]["rule"]
    for path in (contract.RUNTIME_DIR, contract.SCRIPT_DIR):
        assert path.removeprefix("/") in rule
    assert contract.TOKEN_DIR.startswith("/var/run/trainyard/")


def test_enums_are_those_of_the_contract() -> None:
    assert at(".status.phase")["enum"] == [str(p) for p in contract.Phase]
    for cause in (".status.rootCause.class", ".status.attempts[].cause.class"):
        assert at(cause)["enum"] == [str(c) for c in contract.FailureClass]
    assert at(".status.attempts")["maxItems"] == MAX_ATTEMPTS


def test_printer_columns_show_fields_that_exist() -> None:
    columns = VERSION["additionalPrinterColumns"]
    assert [c["name"] for c in columns if not c.get("priority")] == [
        "Phase",
        "Nodes",
        "Attempt",
        "Step",
        "Progress",
        "Age",
    ]
    for column in columns:
        path = column["jsonPath"]
        if path == ".metadata.creationTimestamp" or "[?" in path:
            continue
        assert path in ALL, column["name"]
        assert column["type"] == ALL[path]["type"], column["name"]


# ---- the dataclasses --------------------------------------------------------------------------------


def inner(hint: Any) -> Any:
    """The type behind `| None`."""
    if isinstance(hint, types.UnionType):
        options = [o for o in typing.get_args(hint) if o is not type(None)]
        return options[0] if len(options) == 1 else frozenset(options)
    return hint


def compare(cls: type, schema: Schema, path: str) -> Iterator[str]:
    """Differences between a dataclass and its schema."""
    assert schema["type"] == "object"
    known = {key: (hint, required) for _, key, hint, required in _fields(cls)}
    if missing := set(known) - set(schema["properties"]):
        yield f"{path}: the schema lacks {sorted(missing)}"
    if extra := set(schema["properties"]) - set(known):
        yield f"{path}: the dataclass lacks {sorted(extra)}"
    for key, (hint, required) in known.items():
        field = schema["properties"].get(key, {})
        yield from compare_type(inner(hint), field, f"{path}.{key}")
        if required and key not in schema.get("required", ()):
            yield f"{path}.{key}: not required by the schema"
        if not required and key in schema.get("required", ()) and not path.startswith("status"):
            yield f"{path}.{key}: required by the schema, has a default in the dataclass"


def compare_type(hint: Any, schema: Schema, path: str) -> Iterator[str]:
    if dataclasses.is_dataclass(hint):
        yield from compare(typing.cast(type, hint), schema, path)
        return
    if typing.get_origin(hint) is list:
        if schema.get("type") != "array":
            yield f"{path}: a list, but {schema.get('type')} in the schema"
        else:
            yield from compare_type(typing.get_args(hint)[0], schema["items"], f"{path}[]")
        return
    if isinstance(hint, frozenset):
        if hint != {int, str} or not schema.get("x-kubernetes-int-or-string"):
            yield f"{path}: {hint} in the dataclass, and not int-or-string in the schema"
        return
    wanted = {str: "string", int: "integer", float: "number", bool: "boolean"}
    name = wanted.get(hint, "object")
    if schema.get("type") != name:
        yield f"{path}: {name} in the dataclass, {schema.get('type')} in the schema"


def defaults(cls: type, schema: Schema, path: str) -> Iterator[str]:
    """Differences between the defaults of a dataclass and those of its schema."""
    for field in dataclasses.fields(cls):
        key = field.metadata.get("key", next(k for name, k, _, _ in _fields(cls) if name == field.name))
        sub = schema["properties"][key]
        if field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            value = field.default
        else:
            value = None
        hint = inner(typing.get_type_hints(cls)[field.name])
        element = typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint
        if dataclasses.is_dataclass(element):
            yield from defaults(typing.cast(type, element), sub.get("items", sub), f"{path}.{key}")
        wanted = encode(value) if value is not None else None
        if effective(sub) != empty_as_none(wanted):
            yield f"{path}.{key}: {wanted!r} in the dataclass, {effective(sub)!r} in the schema"


def empty_as_none(value: Any) -> Any:
    """No list, an empty list and an object of empty things are the same: the API stores none for them."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if empty_as_none(v) is not None}
        return kept or None
    return None if value in ([], None) else value


def effective(schema: Schema) -> Any:
    """What the API server stores when the field is not given: defaults apply inside of defaults."""
    if "default" not in schema:
        return None
    value = schema["default"]
    if isinstance(value, dict):
        inside = {k: effective(s) for k, s in schema.get("properties", {}).items()}
        value = {k: v for k, v in inside.items() if v is not None} | value
    return value


def test_fields_of_the_spec() -> None:
    assert not list(compare(Spec, SPEC, "spec"))


def test_fields_of_the_status() -> None:
    assert not list(compare(Status, STATUS, "status"))


def test_defaults_of_the_spec() -> None:
    assert not list(defaults(Spec, SPEC, "spec"))


def test_the_status_has_no_defaults() -> None:
    """The operator writes it whole; a default would come back as a change that nobody made."""
    assert not [p for p, s in walk(STATUS, "status") if "default" in s]
