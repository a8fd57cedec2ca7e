"""Gradient checkpointing: what a block computes inside is forgotten, and computed again when gradients are asked for.

Memory of activations falls from that of all blocks to their inputs and one block (Chen et al., 2016, arXiv:1604.06174);
the forward pass is done twice. The gradients are the same: random numbers are drawn again as they were, and layers with
running statistics count a batch once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

# The name that MONAI's networks have for it.
_FLAG = "use_checkpoint"
T = TypeVar("T")


class Checkpointed(nn.Module):
    """The base of networks that pass their blocks by `through`; off until `checkpoint_blocks` says otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.use_checkpoint = False

    def through(self, block: Callable[..., T], *inputs: Any) -> T:
        """What a block gives; forgets what it computed inside where the network is checkpointed.

        `block` is a layer, or a function of tensors that uses this network's layers.
        """
        if not (self.use_checkpoint and torch.is_grad_enabled()):
            return block(*inputs)
        norms = block if isinstance(block, nn.Module) else self
        # On torch's `meta` device there are no random numbers to keep.
        real = not any(isinstance(value, Tensor) and value.is_meta for value in inputs)
        found: T = checkpoint(
            block, *inputs, use_reentrant=False, preserve_rng_state=real, context_fn=lambda: _passes(norms)
        )
        return found


def checkpoint_blocks(model: nn.Module) -> int:
    """Let a network's blocks forget what they compute inside; how many of its parts can, 0 where none does."""
    parts = [part for part in model.modules() if isinstance(getattr(part, _FLAG, None), bool)]
    for part in parts:
        setattr(part, _FLAG, True)
    # Networks of Hugging Face have a switch of their own, by either name.
    switches = [found for part in model.modules() if (found := _switch(part)) is not None]
    for switch in switches:
        switch({"use_reentrant": False})
    return len(parts) + len(switches)


def _switch(part: nn.Module) -> Callable[[dict[str, bool]], None] | None:
    if not getattr(part, "supports_gradient_checkpointing", False):
        return None
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    return next((found for name in names if callable(found := getattr(part, name, None))), None)


def _passes(norms: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """What holds in the first pass, and in that which computes the same again."""
    return nullcontext(), _counted_before(norms)


@contextmanager
def _counted_before(block: nn.Module) -> Iterator[None]:
    """Until the context is left, layers add what they see to copies of their running statistics."""
    norms = [layer for layer in block.modules() if isinstance(layer, _NormBase) and layer.training]
    kept = [(layer, dict(layer._buffers)) for layer in norms]
    for layer, buffers in kept:
        layer._buffers.update({name: None if value is None else value.clone() for name, value in buffers.items()})
    try:
        yield
    finally:
        for layer, buffers in kept:
            layer._buffers.update(buffers)
