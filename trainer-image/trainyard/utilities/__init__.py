"""Small things that modules, callbacks and scripts use. Everything here is imported when it is first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainyard.lazy import lazy_names

if TYPE_CHECKING:
    from trainyard.utilities.combined_loader import CombinedLoader
    from trainyard.utilities.grads import grad_norm
    from trainyard.utilities.memory import move_data_to_device
    from trainyard.utilities.parsing import AttributeDict
    from trainyard.utilities.rank_zero import (
        rank_zero_debug,
        rank_zero_deprecation,
        rank_zero_info,
        rank_zero_only,
        rank_zero_warn,
    )

_WHERE = {
    "AttributeDict": "parsing",
    "CombinedLoader": "combined_loader",
    "grad_norm": "grads",
    "move_data_to_device": "memory",
    "rank_zero_debug": "rank_zero",
    "rank_zero_deprecation": "rank_zero",
    "rank_zero_info": "rank_zero",
    "rank_zero_only": "rank_zero",
    "rank_zero_warn": "rank_zero",
}

__all__ = [
    "AttributeDict",
    "CombinedLoader",
    "grad_norm",
    "move_data_to_device",
    "rank_zero_debug",
    "rank_zero_deprecation",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
]

__getattr__, __dir__ = lazy_names(__name__, _WHERE)
