"""The one way of a tensor's numbers from the device it was computed on into this process's memory. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]


def on_host(tensor: Tensor) -> Array:
    """A tensor's numbers in its own dtype and shape; those of 16 bits that numpy does not know are widened to float32.

    The array of a tensor on the CPU shares its memory. All code takes numbers from tensors here: on a GPU each copy
    waits for everything that was asked of it, and on torch's `meta` device, which has no numbers, any other way fails.
    """
    return copied(tensor.detach())


def copied(tensor: Tensor) -> Array:
    """What `on_host` does, in a place of its own for tests on a device without numbers."""
    near = tensor.cpu().resolve_conj().resolve_neg()
    return np.asarray(near.float().numpy() if str(near.dtype) == "torch.bfloat16" else near.numpy())
