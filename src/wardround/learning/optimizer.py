"""A site's optimiser: how it is built, its rate at each step, and its state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from wardround.study.schema import Local
from wardround.wire.host import on_host

Array = npt.NDArray[Any]
OPTIMIZER = "optimizer/"


def learning_rate(local: Local, step: int, total: int) -> float:
    """The rate of global step `step` of `total`: linear warm-up, then constant or a half cosine to zero."""
    if step < local.warmup:
        return local.lr * (step + 1) / local.warmup
    if local.schedule == "constant":
        return local.lr
    # Rounds that take the place of aborted ones come after the last step of the schedule.
    progress = min(1.0, (step - local.warmup) / max(1, total - local.warmup))
    return local.lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_optimizer(parts: Sequence[nn.Module], local: Local) -> torch.optim.Optimizer:
    """The site's optimiser over everything that gradients reach, each part of a model with a rate of its own."""
    parameters = [{"params": [p for p in part.parameters() if p.requires_grad]} for part in parts]
    # The same digits, in half the time: torch would go through the tensors one by one in Python on a CPU.
    common: Any = {"lr": local.lr, "weight_decay": local.weight_decay, "foreach": True}
    match local.optimizer:
        case "sgd":
            return torch.optim.SGD(parameters, momentum=local.momentum, **common)
        case "adam":
            return torch.optim.Adam(parameters, **common)
        case "adamw":
            return torch.optim.AdamW(parameters, **common)


def saved_optimizer(optimizer: torch.optim.Optimizer, prefix: str = OPTIMIZER) -> dict[str, Array]:
    """The optimiser's tensors, by parameter number and slot."""
    return {
        f"{prefix}{index}/{slot}": on_host(value).copy()
        for index, slots in optimizer.state_dict()["state"].items()
        for slot, value in slots.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Array], prefix: str = OPTIMIZER) -> None:
    """Put back what `saved_optimizer` saved; does nothing in the first round."""
    state: dict[int, dict[str, Tensor]] = {}
    for name in tensors:
        if name.startswith(prefix):
            index, slot = name.removeprefix(prefix).split("/")
            state.setdefault(int(index), {})[slot] = torch.from_numpy(tensors[name])
    if state:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
