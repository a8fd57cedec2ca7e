"""What the frozen leading layers of a network give of an image, computed once where images come again and again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from wardround.wire.host import on_host
from wardround.wire.tensors import tensors_sha256

# Bytes that a process keeps.
CAPACITY = 2**28


@runtime_checkable
class Layered(Protocol):
    """A network that is a sequence of layers before its last ones, of which the first may be given as a `Lead`."""

    lead: Lead | None

    def layers(self) -> tuple[nn.Module, ...]:
        """The layers that a `Lead` may stand for, in the order in which an image passes them."""
        ...


@runtime_checkable
class Embedding(Layered, Protocol):
    """A layered network whose layers are slow and give much of an image, so that a site keeps it on its disk."""

    @property
    def given_shape(self) -> tuple[int, ...]:
        """Of what all layers give of one image: float32."""
        ...


class Keeping(Protocol):
    """Where what leading layers give outlives the process: a place of one site."""

    def get(self, key: bytes) -> Tensor | None:
        """What was put there, (1, ...)."""
        ...

    def put(self, key: bytes, value: Tensor) -> None:
        """Keep it."""
        ...


class Lead:
    """Leading layers that never change and are in evaluation mode, with what they gave of images seen before.

    Images (B, ...) -> what the last layer gives, (B, ...), with no gradient. On the CPU each image passes alone, so
    that what it gives depends on it and not on the batch: a run that goes on after a stop gives the same bits. It is
    known by the hash of its values. On another device, and in another precision, the layers see the batch as it is.
    Beyond `capacity` bytes it is kept on the `shelf` of the site whose images they are, where that has one.
    """

    shelf: Keeping | None = None

    def __init__(self, layers: Sequence[nn.Module], capacity: int = CAPACITY) -> None:
        self._layers = tuple(layers)
        self._room = capacity
        self._kept: dict[bytes, Tensor] = {}

    def __len__(self) -> int:
        return len(self._layers)

    def __call__(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            if images.is_meta:
                # Where memory is counted: as on the CPU, where all images take as much as one.
                return torch.cat([self._through(images[:1])] * len(images))
            if images.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
                return self._through(images)
            return torch.cat([self._of(image[None]) for image in images])

    def _of(self, image: Tensor) -> Tensor:
        key = hashlib.blake2b(on_host(image).tobytes(), digest_size=32).digest()
        found = self._kept.get(key)
        if found is None:
            found = self._on_shelf(key, image)
            if found.nbytes <= self._room:
                self._room -= found.nbytes
                self._kept[key] = found
        return found

    def _on_shelf(self, key: bytes, image: Tensor) -> Tensor:
        found = None if self.shelf is None else self.shelf.get(key)
        if found is None:
            found = self._through(image)
            if self.shelf is not None:
                self.shelf.put(key, found)
        return found

    @cached_property
    def base(self) -> str:
        """Sha256 (hex) of the layers' values."""
        states = (layer.state_dict() for layer in self._layers)
        return tensors_sha256(
            {f"{n}.{name}": on_host(t) for n, state in enumerate(states) for name, t in state.items()}
        )

    def _through(self, images: Tensor) -> Tensor:
        for layer in self._layers:
            images = layer(images)
        return images
