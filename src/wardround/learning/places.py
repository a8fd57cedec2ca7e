"""What a layer says of an example, averaged over the places of it. Imports no torch before it is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wardround.errors import StudyError

if TYPE_CHECKING:
    from torch import Tensor


def pooled(found: Any, name: str) -> Tensor:
    """(B, F) of (B, F), tokens (B, T, F) or (B, F, *places); raises `StudyError` for anything else."""
    import torch

    if not isinstance(found, torch.Tensor) or found.ndim < 2:
        raise StudyError(
            f"method.layer: {name!r} of the network does not give a tensor (B, F), (B, T, F) or (B, F, *places); name "
            "another module"
        )
    if found.ndim == 3:
        return found.mean(dim=1)
    return found.flatten(2).mean(dim=2) if found.ndim > 3 else found
