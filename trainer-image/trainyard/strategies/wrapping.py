"""Which modules are sharded as one: gathered together before their forward, freed after it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from trainyard.errors import MisconfigurationException

BLOCK_PARAMETERS = 2**16
"""Smallest element of a ModuleList that is sharded on its own: below, a message costs more than it saves."""
MODULE_PARAMETERS = 10_000_000
"""Smallest other module that is sharded on its own."""

Policy = Iterable[type[nn.Module]] | Callable[..., Any] | None


def chosen(root: nn.Module, policy: Policy, what: str) -> list[nn.Module]:
    """Modules below `root` that `policy` names, children before parents. Raises MisconfigurationException naming `what`.

    A set of classes; a predicate of a module; a policy of torch.distributed.fsdp.wrap (ModuleWrapPolicy,
    CustomPolicy, `functools.partial(size_based_auto_wrap_policy, ...)`); None for what suits most models.
    """
    if policy is None:
        picked = _by_default(root)
    elif hasattr(policy, "_run_policy"):
        named = policy._run_policy(root, ignored_modules=set(), root_kwargs={})
        picked = [module for module in _below(root) if module in named]
    elif isinstance(policy, type) and issubclass(policy, nn.Module):
        picked = [module for module in _below(root) if isinstance(module, policy)]
    elif callable(policy):
        picked = _by_recursion(root, policy) if _recursive(policy) else list(filter(policy, _below(root)))
    else:
        picked = [module for module in _below(root) if isinstance(module, _classes(policy, what))]
    return [module for module in picked if any(True for _ in module.parameters())]


def shardable(root: nn.Module, policy: Policy) -> list[nn.Module]:
    """What of it can be sharded on its own: a parameter that is also used elsewhere must stay with `root`."""
    users: dict[int, set[int]] = {}
    for module in root.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), set()).add(id(module))

    def alone(module: nn.Module) -> bool:
        inside = {id(part) for part in module.modules()}
        return all(users[id(p)] <= inside for p in module.parameters())

    # A ModuleList or ModuleDict is only iterated: it has no forward, so nothing would gather it.
    return [
        module
        for module in chosen(root, policy, "auto_wrap_policy")
        if alone(module) and not isinstance(module, nn.ModuleList | nn.ModuleDict)
    ]


def _below(root: nn.Module) -> list[nn.Module]:
    """All modules but the root, children first."""
    return [module for module in reversed(list(root.modules())) if module is not root]


def _classes(policy: Any, what: str) -> tuple[type[nn.Module], ...]:
    classes = tuple(policy) if isinstance(policy, Iterable) else (policy,)
    for given in classes:
        if not (isinstance(given, type) and issubclass(given, nn.Module)):
            raise MisconfigurationException(
                f"{what}: {given!r} is no class of modules; give a set of classes, a function of a module, or a policy of "
                "torch.distributed.fsdp.wrap"
            )
    return classes


def _by_default(root: nn.Module) -> list[nn.Module]:
    """The elements of every ModuleList (the blocks of a transformer), and large modules that are made of others."""
    picked: list[nn.Module] = []

    def visit(module: nn.Module) -> int:
        """Parameters in `module` that are in no picked module."""
        left = sum(p.numel() for p in module.parameters(recurse=False))
        for child in module.children():
            if isinstance(module, nn.ModuleList):
                size = sum(p.numel() for p in child.parameters())
                if size >= BLOCK_PARAMETERS:
                    picked.append(child)
                else:
                    left += size
            else:
                left += visit(child)
        composite = any(True for _ in module.children()) and not isinstance(
            module, nn.ModuleList | nn.ModuleDict
        )
        # Never a single layer: others may use its weight without calling it, as tied output layers do.
        if module is not root and composite and left >= MODULE_PARAMETERS:
            picked.append(module)
            return 0
        return left

    visit(root)
    return picked


def _recursive(policy: Callable[..., Any]) -> bool:
    """Whether it is of the kind that torch's FSDP calls with (module, recurse, nonwrapped_numel)."""
    inner = policy.func if isinstance(policy, functools.partial) else policy
    return "recurse" in inspect.signature(inner).parameters


def _by_recursion(root: nn.Module, policy: Callable[..., Any]) -> list[nn.Module]:
    """torch.distributed.fsdp.wrap's protocol: "shall I look inside?" on the way down, "shall I wrap?" on the way up."""
    picked: list[nn.Module] = []

    def visit(module: nn.Module) -> int:
        numel = sum(p.numel() for p in module.parameters())
        wrapped = 0
        if policy(module=module, recurse=True, nonwrapped_numel=numel):
            wrapped = sum(visit(child) for child in module.children())
        left = numel - wrapped
        if module is not root and policy(module=module, recurse=False, nonwrapped_numel=left):
            picked.append(module)
            return numel
        return wrapped

    visit(root)
    return picked
