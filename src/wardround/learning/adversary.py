"""A network that a site trains against the shared one, and that stays at the site.

Its values and what its optimiser remembers lie in the site's memory of the method: a round goes on where the last one
ended, also after a stop, and no message holds any of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call

from wardround.wire.random import public_seed

if TYPE_CHECKING:
    from wardround.learning.methods.method import LocalRound

_VALUES, _SQUARES = "adversary/", "adversary_squares/"
# RMSprop, as torch has it: v <- decay v + (1 - decay) g^2, p <- p - rate g / (sqrt(v) + epsilon).
_DECAY, _EPSILON = 0.99, 1e-8


class Adversary:
    """One site's network, trained by RMSprop (Hinton, 2012) with a rate of its own."""

    def __init__(self, network: nn.Module, squares: dict[str, Tensor], rate: float) -> None:
        self.network = network
        self._squares = squares
        self._rate = rate

    @classmethod
    def of(cls, local: LocalRound, build: Callable[[], nn.Module], rate: float) -> Adversary:
        """As the site's last round left it; in its first one as `build` makes it, from public randomness of the site.

        Torch's own random numbers go on where they were.
        """
        with torch.random.fork_rng([]):
            torch.manual_seed(public_seed(local.seed, local.site, "adversary") % 2**63)
            network = build()
        network = network.to(next(iter(local.shared.values())).device)
        squares = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
        if all(_VALUES + name in local.memory for name in squares):
            with torch.no_grad():
                for name, parameter in network.named_parameters():
                    parameter.copy_(local.memory[_VALUES + name])
                    squares[name].copy_(local.memory[_SQUARES + name])
        return cls(network, squares, rate)

    def step(self, loss: Tensor) -> None:
        """One step down a loss that it is part of; gradients of nothing else are made."""
        named = dict(self.network.named_parameters())
        gradients = torch.autograd.grad(loss, list(named.values()))
        with torch.no_grad():
            for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
                square = self._squares[name]
                square.mul_(_DECAY).addcmul_(gradient, gradient, value=1.0 - _DECAY)
                parameter.sub_(self._rate * gradient / (square.sqrt() + _EPSILON))

    def judged(self, given: Tensor) -> Tensor:
        """What it says, with gradients to what it is given and none to itself."""
        still = {name: parameter.detach() for name, parameter in self.network.named_parameters()}
        said: Tensor = functional_call(self.network, still, (given,))
        return said

    def keep(self, local: LocalRound) -> None:
        """Leave it in the site's memory."""
        for name, parameter in self.network.named_parameters():
            local.memory[_VALUES + name] = parameter.detach()
            local.memory[_SQUARES + name] = self._squares[name]
