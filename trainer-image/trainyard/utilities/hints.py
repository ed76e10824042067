"""What a class or function takes: names, resolved type hints, defaults and words about them."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import inspect
import itertools
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Parameter:
    """One argument."""

    name: str
    hint: Any
    default: Any
    """`inspect.Parameter.empty` if there is none."""
    doc: str = ""

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty


def parameters_of(target: Callable[..., Any]) -> list[Parameter]:
    """Of a class's `__init__`, or of a function. `**kwargs` that `__init__` hands to `super().__init__` are those of the
    parent classes."""
    return list(_parameters(target)[0])


def takes_anything(target: Callable[..., Any]) -> bool:
    """Whether it has `**kwargs` of its own use."""
    return _parameters(target)[1]


@functools.cache
def _parameters(target: Callable[..., Any]) -> tuple[tuple[Parameter, ...], bool]:
    found: dict[str, Parameter] = {}
    for function in _functions(target):
        docs = _docs(target, function)
        signature = inspect.signature(function)
        opened = False
        for number, parameter in enumerate(signature.parameters.values()):
            if number == 0 and isinstance(target, type) and "." in function.__qualname__:
                continue  # self
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                opened = True
            elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
                name = parameter.name
                hint = _resolve(parameter.annotation, function)
                found.setdefault(name, Parameter(name, hint, parameter.default, docs.get(name, "")))
        if not opened:
            return tuple(found.values()), False
        if not (isinstance(target, type) and _forwards(function)):
            return tuple(found.values()), True
    return tuple(found.values()), False


def _functions(target: Callable[..., Any]) -> Iterator[Any]:
    if not isinstance(target, type):
        yield target
        return
    for cls in target.__mro__:
        init = vars(cls).get("__init__")
        if isinstance(init, types.FunctionType) or hasattr(init, "__wrapped__"):
            yield init


def _forwards(function: Any) -> bool:
    """Whether its `**kwargs` go to `super().__init__` (or `Parent.__init__`), and nowhere else."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, SyntaxError, TypeError):
        return False
    name = next(
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind is inspect.Parameter.VAR_KEYWORD
    )
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == name]
    forwarded = [
        keyword
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "__init__"
        for keyword in node.keywords
        if keyword.arg is None and isinstance(keyword.value, ast.Name) and keyword.value.id == name
    ]
    return bool(forwarded) and len(uses) == len(forwarded)


# ---- hints


class _Names(dict[str, Any]):
    """Where the names of an annotation are looked up: in the module, and in what it imports for type checkers."""

    def __init__(self, namespace: Mapping[str, Any]) -> None:
        super().__init__()
        self._namespace = namespace

    def __missing__(self, name: str) -> Any:
        if name in self._namespace:
            return self._namespace[name]
        builtins = vars(importlib.import_module("builtins"))
        if name in builtins:
            return builtins[name]
        where = _checked_imports(str(self._namespace.get("__name__"))).get(name)
        if where is None:
            return Any
        try:
            module = importlib.import_module(where[0])
        except ImportError:
            return Any
        return getattr(module, where[1]) if where[1] else module


def _resolve(annotation: Any, function: Any) -> Any:
    if annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(annotation, str):
        return annotation
    namespace = getattr(inspect.unwrap(function), "__globals__", {})
    try:
        return eval(annotation, {}, _Names(namespace))  # noqa: S307 - an annotation of code that is imported
    except Exception:
        return Any


@functools.cache
def _checked_imports(module: str) -> dict[str, tuple[str, str]]:
    """What stands under `if TYPE_CHECKING:`: {name: (module, attribute or "")}."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError, SyntaxError):
        return {}
    found: dict[str, tuple[str, str]] = {}
    for block in tree.body:
        if not (isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)):
            continue
        for node in block.body:
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.update((a.asname or a.name, (node.module, a.name)) for a in node.names)
            elif isinstance(node, ast.Import):
                found.update((a.asname, (a.name, "")) for a in node.names if a.asname)
    return found


def type_name(hint: Any) -> str:
    """As somebody would write it."""
    if hint is Any:
        return "any value"
    if hint is type(None) or hint is None:
        return "None"
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_name(a) for a in inner)
    if origin is typing.Literal:
        return " | ".join(repr(a) for a in inner)
    if origin is not None and inner:
        shown = ", ".join("..." if a is Ellipsis else type_name(a) for a in inner if not isinstance(a, list))
        name = getattr(origin, "__name__", str(origin))
        return name if name == "Callable" else f"{name}[{shown}]"
    return getattr(hint, "__name__", str(hint))


# ---- words


_GOOGLE = re.compile(r"^(Args|Arguments|Parameters|Attributes):\s*$")
_ENTRY = re.compile(r"^\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)$")
_SPHINX = re.compile(r"^:param\s+(?:[^:]*\s)?(\w+):\s*(.*)$")
_NUMPY = re.compile(r"^(\w+)\s*(?::.*)?$")


def _docs(target: Any, function: Any) -> dict[str, str]:
    """{argument: words} of the docstrings, Google's, numpy's or Sphinx's way, and of fields' docstrings."""
    found: dict[str, str] = {}
    owner = target
    if isinstance(target, type):
        owner = next((c for c in target.__mro__ if vars(c).get("__init__") is function), target)
    for text in (
        inspect.getdoc(function) or "",
        vars(owner).get("__doc__") or "" if owner is not function else "",
    ):
        found = {**parse_docstring(text), **found}
    return {**(_field_docs(owner) if isinstance(owner, type) else {}), **found}


def parse_docstring(text: str) -> dict[str, str]:
    """The words about each argument, on one line each."""
    found: dict[str, list[str]] = {}
    lines = inspect.cleandoc(text).splitlines()
    section = current = ""
    depth = 0
    for number, line in enumerate(lines):
        bare, indent = line.strip(), len(line) - len(line.lstrip())
        following = lines[number + 1].strip() if number + 1 < len(lines) else ""
        if match := _SPHINX.match(bare):
            current, section, depth = match[1], "sphinx", indent
            found[current] = [match[2]]
        elif _GOOGLE.match(bare):
            section, current, depth = "google", "", indent + 1
        elif bare in ("Parameters", "Attributes") and set(following) == {"-"}:
            section, current, depth = "numpy", "", indent
        elif section and bare and (set(bare) == {"-"}):
            continue
        elif section == "google":
            if bare and indent < depth:
                section = current = ""
            elif (match := _ENTRY.match(bare)) and (not found or indent <= depth or not current):
                current, depth = match[1], max(indent, 1)
                found[current] = [match[2]]
            elif current and bare:
                found[current].append(bare)
        elif section == "numpy":
            if set(following) == {"-"} and following:
                section = current = ""
            elif indent == depth and (match := _NUMPY.match(bare)):
                current = match[1]
                found[current] = []
            elif current and bare:
                found[current].append(bare)
        elif section == "sphinx" and current and bare and indent > depth:
            found[current].append(bare)
    return {name: " ".join(words).strip() for name, words in found.items()}


def _field_docs(cls: type) -> dict[str, str]:
    """Strings that stand below annotated names in a class's body."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, SyntaxError, TypeError):
        return {}
    (node,) = tree.body
    found = {}
    body = getattr(node, "body", [])
    for entry, following in itertools.pairwise(body):
        if not (isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name)):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            found[entry.target.id] = " ".join(str(following.value.value).split())
    return found


# ---- names


def nearest(name: str, known: Collection[str]) -> str:
    """`; the nearest is 'x'`, or what there is."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    if near:
        return f"; the nearest is {near[0]!r}"
    return f"; there is: {', '.join(known)}" if known else "; it takes none"


def check_names(given: Collection[str], known: Collection[str], place: str, *, of: str) -> None:
    """Raises ConversionError that names the nearest known name and the place."""
    from trainyard.utilities.convert import ConversionError

    for name in given:
        if name not in known:
            where = f"{place}.{name}" if place else str(name)
            raise ConversionError(where, f"{of} has no {str(name)!r}{nearest(str(name), known)}")


def import_path(path: str) -> Any:
    """The class or function `package.module.Name`. Raises ImportError that says which part is wrong."""
    module, _, name = path.rpartition(".")
    if not module:
        raise ImportError(f"{path!r} is not an import path like package.module.{path or 'Name'}")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            outer, _, inner = module.rpartition(".")
            if outer and inner and error.name == module:
                with_class = _nested(outer, inner, name)
                if with_class is not None:
                    return with_class
            raise ImportError(f"{path}: there is no module {error.name!r}") from error
        raise ImportError(f"{path}: {module} cannot be imported: {error}") from error
    if not hasattr(found, name):
        public = [n for n in vars(found) if not n.startswith("_")]
        raise ImportError(f"{path}: module {module} has no {name!r}{nearest(name, public)}")
    return getattr(found, name)


def _nested(module: str, cls: str, name: str) -> Any:
    """`module.Class.method`."""
    try:
        return getattr(getattr(importlib.import_module(module), cls), name)
    except (ImportError, AttributeError):
        return None
