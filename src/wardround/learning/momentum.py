"""Momentum at the site: what it sends is an average of its changes over rounds. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from wardround.learning.methods.method import MODEL

Array = npt.NDArray[Any]
Changes = dict[str, dict[str, Array]]
MOMENTUM = "momentum/"


def averaged(changes: Changes, memory: Mapping[str, Array], momentum: float) -> tuple[Changes, dict[str, Array]]:
    """m <- momentum m + (1 - momentum) change, from m = 0: what to send, and what the site keeps of it.

    Averages of many rounds scatter less than one round's change, so that honest sites look alike and an attack cannot
    hide between them (Karimireddy et al., *Learning from history*, ICML 2021). From zero, what a site sends over all
    rounds adds up to what it learned, delayed. Only the model's steps are averaged: running statistics and side
    channels are sent as they are.
    """
    sent, kept = dict(changes), {}
    for group, tensors in changes.items():
        if group != MODEL:
            continue
        sent[group] = {}
        for name, change in tensors.items():
            key = f"{MOMENTUM}{group}/{name}"
            old = memory[key] if key in memory else np.zeros_like(change)
            running = momentum * old + (1.0 - momentum) * change
            sent[group][name] = kept[key] = running.astype(change.dtype)
    return sent, kept
