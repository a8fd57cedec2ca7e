"""Networks that learn what images look like, whatever measured them."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class LearnsImages(Protocol):
    """A network whose training sees images and no raw data; the scanner is known when it reconstructs."""

    def learned(self, images: Tensor) -> Tensor:
        """What training lowers, of true images (B, H, W); scalar."""
        ...
