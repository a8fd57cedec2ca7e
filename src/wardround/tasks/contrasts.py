"""Contrasts that some sites, or some patients of a clinic, do not have: their channels are 0.

An image's channels have mean 0 and deviation 1 over what they show, so a channel of zeros everywhere says by itself
that there is none. A network that never saw such a channel in training does not know what to make of it: with
`task.drop_contrasts` every site hides contrasts at random (modality dropout: Neverova et al., *ModDrop*, IEEE TPAMI 38,
2016), so the shared network learns to do without.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from torch import Tensor

from wardround.imaging.readers.labelled import LabelledImage
from wardround.wire.host import on_host


def without(channels: Tensor, absent: Collection[int]) -> Tensor:
    """Channels (C, *shape) with those that are `absent` exactly 0, whatever changed them; the same where none is."""
    if not absent:
        return channels
    channels = channels.clone()
    channels[sorted(absent)] = 0.0
    return channels


def dropped(channels: Tensor, absent: Collection[int], share: float, random: np.random.Generator) -> Tensor:
    """The same, and each of the others 0 with probability `share`, by `random` alone; one of them always stays.

    Where all would go, the one of the largest number stays. Nothing is drawn where the share is 0.
    """
    if share <= 0.0:
        return without(channels, absent)
    numbers = random.random(len(channels))
    present = [number for number in range(len(channels)) if number not in absent]
    kept = {number for number in present if numbers[number] >= share} or {max(present, key=lambda n: numbers[n])}
    return without(channels, [number for number in range(len(channels)) if number not in kept])


def first_shown(absent: Collection[int]) -> int:
    """The first channel that is there: what a person looks at."""
    return next(number for number in range(len(absent) + 1) if number not in absent)


def lacking(image: LabelledImage, images: Sequence[str]) -> tuple[str, ...]:
    """Which of the study's contrasts an image does not have."""
    return tuple(images[number] for number in image.absent)


def first_with_anything(images: Tensor) -> int:
    """The first channel of a batch (B, C, *shape) that is not 0 everywhere: what a person looks at."""
    seen = on_host(images.transpose(0, 1).flatten(1).ne(0).any(1))
    return int(seen.argmax())
