"""Whether a network diverged: seen in what it gives, because a metric that may be absent does not show it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wardround.wire.host import on_host


class Divergence:
    """Whether a network gave NaN since this was last asked."""

    def __init__(self) -> None:
        self._found: list[Tensor] = []

    def __call__(self) -> bool:
        """The answer; from now on only what follows counts."""
        found, self._found = self._found, []
        return bool(found) and bool(on_host(torch.stack(found)).any())

    def see(self, _module: nn.Module, _arguments: Any, output: Any) -> None:
        """Look at an output: a forward hook."""
        self._found.extend(tensor.isnan().any() for tensor in _tensors(output))


@contextmanager
def watched(model: nn.Module) -> Iterator[Divergence]:
    """Watch what a network gives, until the context is left."""
    divergence = Divergence()
    handle = model.register_forward_hook(divergence.see)
    try:
        yield divergence
    finally:
        handle.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for part in output.values():
            yield from _tensors(part)
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _tensors(part)
