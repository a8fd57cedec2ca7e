"""Which part of a network sees an image first, and turns it into features: what the network says of itself."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class Encoding(Protocol):
    """A network, or a part of one, that knows its encoder."""

    @property
    def encoder_parts(self) -> tuple[str, ...]:
        """The names of its modules, relative to itself, that make features of an image."""
        ...


def encoder_of(model: nn.Module) -> frozenset[str]:
    """The parameters and buffers of all encoders in a network, by their names in its state; none where none is known.

    Of an unrolled network that is the encoder of each of its denoisers.
    """
    found = {
        f"{prefix}.{part}." if prefix else f"{part}."
        for prefix, module in model.named_modules()
        if isinstance(module, Encoding)
        for part in module.encoder_parts
    }
    return frozenset(name for name in model.state_dict() if any(name.startswith(start) for start in found))
