"""Episodes: a step lowers the loss of a batch, and the loss of a changed batch after a step on the first one.

With values w, batch x and its change x':

    w' = w - rate * grad L(x; w),    gradient = grad L(x; w) + grad L(x'; w') taken at w'

(Liu et al., *FedDG*, CVPR 2021, equations 4 and 5; Finn et al., *MAML*, ICML 2017). It is the first-order form, as in
the authors' code: that w' depends on w through a gradient, whose derivative would be second-order, is left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def learned(
    model: nn.Module, rate: float, first: Callable[[], Tensor], second: Callable[[], Tensor], scale: float
) -> Tensor:
    """The first loss; the gradient of both, in their places, is left on the model's parameters, which have their bits.

    `first` and `second` add the gradients of their losses to those that are there, times `scale` (that of a
    `GradScaler`). A gradient that is not finite moves nothing: such a step is left out, or ends training.
    """
    loss = first()
    moved = [parameter for parameter in model.parameters() if parameter.grad is not None]
    before = [parameter.detach().clone() for parameter in moved]
    with torch.no_grad():
        for parameter in moved:
            assert parameter.grad is not None
            step = torch.nan_to_num(parameter.grad, nan=0.0, posinf=0.0, neginf=0.0)
            parameter.sub_(step, alpha=rate / scale)
    try:
        second()
    finally:
        with torch.no_grad():
            for parameter, value in zip(moved, before, strict=True):
                parameter.copy_(value)
    return loss
