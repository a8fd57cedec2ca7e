"""Both networks of a chain, the first feeding the second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from wardround.tasks.scanning import ScanBatch

RECONSTRUCTION, DIAGNOSIS = "reconstruction", "diagnosis"


class ChainNetwork(nn.Module):
    """Scans of C channels of B slices -> images (B, C, H, W) and logits of the diagnosis (B, K, ...).

    Without a reconstruction, the second network sees the images that `begin` makes of operator and data, or with `full`
    those that were scanned. `seen` says on which scale.
    """

    def __init__(
        self,
        reconstruction: nn.Module | None,
        diagnosis: nn.Module,
        *,
        begin: Callable[[Any, Any], Tensor],
        seen: Callable[[Tensor], Tensor],
        full: bool = False,
    ) -> None:
        super().__init__()
        self.reconstruction = reconstruction
        self.diagnosis = diagnosis
        self._begin, self._seen, self._full = begin, seen, full

    def forward(self, scans: ScanBatch, channels: int, there: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`scans` are of B * C images, the channels of a slice one after the other.

        there: (B, C), 0 for a scan of nothing, of which no image is seen: it is 0 (`None`: all show something).
        """
        images = self.images(scans).reshape(-1, channels, *scans.target.shape[1:])
        if there is not None:
            images = images * there[:, :, None, None]
        return images, self.diagnosed(images)

    def images(self, scans: ScanBatch) -> Tensor:
        """The first stage alone: real images (B * C, H, W)."""
        if self._full:
            return scans.target
        return scans.images(self._begin if self.reconstruction is None else self.reconstruction)

    def diagnosed(self, images: Tensor) -> Tensor:
        """The second stage alone: logits of images (B, C, H, W)."""
        logits: Tensor = self.diagnosis(self._seen(images))
        return logits
