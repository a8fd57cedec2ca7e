"""The passes of a round over a site's own values, of which nothing is sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy.typing as npt
from torch import Tensor

from wardround.learning.methods.method import LocalRound
from wardround.learning.passes import Pass

Array = npt.NDArray[Any]
Values = Mapping[str, Tensor]


def place(state: Mapping[str, Tensor], values: Values) -> None:
    """Put values into the live tensors of a model, by name; what is not named stays."""
    for name, tensor in values.items():
        state[name].detach().copy_(tensor)


def take_own(
    context: LocalRound,
    passes: Sequence[Pass],
    state: Mapping[str, Tensor],
    values: Values,
    take: Callable[[Pass], dict[str, Array]],
    loss: Callable[[], float] | None,
) -> tuple[Values, dict[str, Array]]:
    """The site's own values after the passes, and what it keeps of their optimisers.

    `values` are the own values before them, `state` the live tensors of the model. `take` takes a pass with what is in
    the model and gives what is kept of its optimiser; `loss` is that of the model on the site's validation patients,
    `None` without any.
    """
    kept: dict[str, Array] = {}
    for one in passes:
        begun = context.memory
        best: tuple[float, Values, dict[str, Array], dict[str, Tensor]] | None = None
        for choice in _choices(one, validated=loss is not None):
            place(state, values)
            context.memory, context.choice = dict(begun), choice
            saved = take(one)
            found = {name: state[name].detach().clone() for name in values}
            # A single choice is taken as it is: nobody else may win.
            score = 0.0 if loss is None or len(one.choices) < 2 else loss()
            if best is None or score < best[0]:
                best = score, found, saved, context.memory
        assert best is not None
        _, values, saved, context.memory = best
        kept |= saved
    return values, kept


def _choices(taken: Pass, *, validated: bool) -> Sequence[float | None]:
    if not taken.choices:
        return (None,)
    return taken.choices if validated else (taken.choices[len(taken.choices) // 2],)
