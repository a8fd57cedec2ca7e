"""The flat step: a step follows the gradient that lies a little uphill of it, so that it ends where minima are flat.

Sharpness-aware minimisation (Foret et al., ICLR 2021, equation 3), as HarmoFL uses it (Jiang et al., AAAI 2022): with
the gradient g of a batch at the values w, the step follows the gradient of the same batch at w + radius g / |g|, and is
taken from w.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from wardround.learning.device import Compute


def stepped(model: nn.Module, radius: float, backward: Callable[[], Tensor], compute: Compute) -> Tensor:
    """The loss of a batch; its gradient, where `radius` is not 0 the flat one, is left on the model's parameters.

    `backward` puts the gradient of the batch there, in as many pieces as it likes, the same each time that it is
    called. Both times the network draws the same random numbers; statistics that layers keep (batch norm's) are those
    of the values w, once. Gradients may be scaled by a number (`GradScaler`): the direction is the same.
    """
    if radius == 0.0:
        return backward()
    with compute.forked_random():
        loss = backward()
    statistics = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with _uphill(model, radius):
        backward()
    with torch.no_grad():
        for buffer, before in statistics:
            buffer.copy_(before)
    return loss


@contextmanager
def _uphill(model: nn.Module, radius: float) -> Iterator[None]:
    """Until the context is left the model is at w + radius g / |g|, and its gradients are empty at first.

    Afterwards it has the bits that it had. Without a gradient, or with one that is not finite, as fp16 may have (such a
    step is left out), it stays where it is.
    """
    moved = [parameter for parameter in model.parameters() if parameter.grad is not None]
    before = [parameter.detach().clone() for parameter in moved]
    gradients = [parameter.grad for parameter in moved if parameter.grad is not None]
    length = torch.sqrt(
        sum((g.float().square().sum() for g in gradients), start=torch.zeros((), device=_device(model)))
    )
    share = torch.where(torch.isfinite(length) & (length > 0.0), radius / length, torch.zeros_like(length))
    with torch.no_grad():
        for parameter, gradient in zip(moved, gradients, strict=True):
            # A gradient that is not finite times 0 is not 0.
            parameter.add_(torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0) * share.to(gradient.dtype))
            parameter.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(moved, before, strict=True):
                parameter.copy_(value)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
