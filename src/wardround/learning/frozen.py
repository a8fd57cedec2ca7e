"""Parts of a model that never change: no gradient reaches them, and their layers stay in evaluation mode."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import takewhile

from torch import nn

from wardround.learning.policy import matching
from wardround.models.lead import Layered, Lead

_HELD = "_wardround_frozen"


def freeze(model: nn.Module, patterns: Sequence[str], also: frozenset[str] = frozenset()) -> frozenset[str]:
    """Freeze the parameters and buffers that the study's `parts.frozen` names, and others; the names of all.

    Raises `StudyError` for a pattern that matches nothing.
    """
    names = matching(patterns, tuple(model.state_dict()), "parts.frozen") | also
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in names:
            parameter.requires_grad_(False)
    for prefix, module in model.named_modules():
        own = [f"{prefix}.{name}" if prefix else name for name in module.state_dict()]
        if own and names.issuperset(own):
            setattr(module, _HELD, True)
    return names


def all_but(model: nn.Module, patterns: Sequence[str]) -> frozenset[str]:
    """The parameters and buffers that none of the patterns of what alone learns matches; none without patterns."""
    if not patterns:
        return frozenset()
    return frozenset(n for n in model.state_dict() if not any(fnmatchcase(n, pattern) for pattern in patterns))


def is_frozen(module: nn.Module) -> bool:
    """Whether a layer is frozen as a whole, with its buffers."""
    return getattr(module, _HELD, False)


def train_mode(model: nn.Module) -> None:
    """Put a model into training mode, except what is frozen as a whole: its statistics and dropout stay as they are."""
    model.train()
    for module in model.modules():
        if is_frozen(module):
            module.eval()


def remember(model: nn.Module) -> None:
    """Compute what a network's frozen leading layers give of an image once; for tasks whose images come again."""
    if isinstance(model, Layered) and (leading := tuple(takewhile(is_frozen, model.layers()))):
        model.lead = Lead(leading)
