"""What one layer of a network says of the examples of a batch: a vector for each, averaged over places."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wardround.errors import StudyError
from wardround.learning.places import pooled
from wardround.study.models import Layer

# By which names layers say how many features go in, and come out.
_IN = ("in_channels", "in_features", "num_features", "embed_dim")
_OUT = ("out_channels", "out_features", "num_features", "embed_dim")


def bottleneck_of(model: nn.Module) -> Layer | None:
    """The layer that the last part of a network with an attribute `bottleneck` names; `None` where no part has one.

    Such a part says the name of one of its own modules: the middle convolution of a stack, the deepest level of a
    U-Net. Of an unrolled network with a part for each iteration it is that of the last one.
    """
    found = [
        Layer(f"{prefix}.{part.bottleneck}" if prefix else part.bottleneck)
        for prefix, part in model.named_modules()
        if isinstance(getattr(part, "bottleneck", None), str)
    ]
    return found[-1] if found else None


def width_of(model: nn.Module, layer: Layer) -> int | None:
    """How many features a layer's vectors have; `None` where none of its modules says so."""
    names = _IN if layer.side == "input" else _OUT
    parts = list(model.get_submodule(layer.name).modules())
    if layer.side == "output":
        parts.reverse()
    widths = (getattr(part, name, None) for part in parts for name in names)
    return next((width for width in widths if isinstance(width, int)), None)


@dataclass
class Watch:
    """The vectors of the calls of a network since they were last taken."""

    layer: Layer
    _calls: list[list[Tensor]] = field(default_factory=list)
    _open: bool = False

    def taken(self) -> Tensor:
        """(examples, F): a vector of each example of each call, with gradients where the call had them.

        A network that reaches the layer several times in a call, as an unrolled one does, has the mean of what it says.
        Raises `StudyError` where the layer was not reached.
        """
        calls, self._calls = self._calls, []
        if not calls or not all(calls):
            raise StudyError(
                f"method.layer: the network does not reach {self.layer.name!r} when the task's loss calls it; name "
                "another module"
            )
        return torch.cat([torch.stack(call).mean(0) for call in calls])

    def _opened(self, *_: Any) -> None:
        self._open = True
        self._calls.append([])

    def _closed(self, *_: Any) -> None:
        # Blocks that are computed once more for the gradient (local.checkpoint) say nothing new.
        self._open = False

    def _said(self, found: Any) -> None:
        if self._open:
            self._calls[-1].append(pooled(found, self.layer.name).float())


@contextmanager
def watching(model: nn.Module, layer: Layer) -> Iterator[Watch]:
    """Until the context is left, note is taken of what the layer says."""
    watch, part = Watch(layer), model.get_submodule(layer.name)
    with ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(watch._opened).remove)
        hooks.callback(model.register_forward_hook(watch._closed).remove)
        if layer.side == "input":
            handle = part.register_forward_pre_hook(lambda _, given: watch._said(given[0]))
        else:
            handle = part.register_forward_hook(lambda _, __, found: watch._said(found))
        hooks.callback(handle.remove)
        yield watch


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Running statistics are afterwards what they were before."""
    kept = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)
