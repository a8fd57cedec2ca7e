"""What a site derives by itself of a study's model: its first values, and how far a round moves them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy.typing as npt

from wardround.learning.methods.method import Method
from wardround.learning.model_context import ModelContext
from wardround.learning.policy import Policy
from wardround.models.adapters import folded_scale, with_folded
from wardround.models.low_rank import is_first_factor, is_folded
from wardround.protection.drift import UpdateBound, local_bound
from wardround.study.schema import Local

Array = npt.NDArray[Any]


class KnownModel:
    """What a site makes of the study that it agreed to, and of a global state; it computes no gradient."""

    def __init__(
        self,
        site: str,
        model_context: ModelContext,
        method: Method,
        policy: Policy,
        local: Local,
        samples: int,
        groups: tuple[str, ...],
    ) -> None:
        self._site = site
        self._model_context = model_context
        self._method = method
        self._policy = policy
        self._local = local
        self._samples = samples
        self._groups = groups
        self._composed: tuple[Mapping[str, Array], dict[str, Array]] | None = None

    def received(self, public: Mapping[str, Array]) -> dict[str, Array]:
        """The shared tensors of a global state, by model name, as far as it holds them.

        Of what is folded into a layer's weight it is that weight: a trap may hide in the sum of both.
        """
        released = self.released(public)
        return {
            name: with_folded(self._model_context.model, name, released[name]) if is_folded(name) else released[name]
            for name in self._policy.names("shared")
            if name in released
        }

    def released(self, public: Mapping[str, Array]) -> dict[str, Array]:
        """The shared tensors as the site gets them: composed once of a state that is looked at and then loaded."""
        if self._composed is None or self._composed[0] is not public:
            self._composed = public, dict(self._method.release_for(self._site, public, {}))
        return self._composed[1]

    def forget(self) -> None:
        """Drop what was composed: from now on it is needed once more at most."""
        self._composed = None

    def approved(self) -> dict[str, Array]:
        """The shared tensors before round 1, by model name: what the site makes of the study it agreed to."""
        shared = tuple(p for p in self._model_context.parameters if self._policy.roles[p.name] == "shared")
        groups = self._method.groups(shared, ring_bits=32)
        return self.received(self._method.initial(groups, self._model_context.initial_values())[0])

    @property
    def trained(self) -> frozenset[str]:
        """The shared tensors that gradients reach."""
        return frozenset(
            p.name for p in self._model_context.parameters if p.trainable and self._policy.roles[p.name] == "shared"
        )

    @property
    def update_bound(self) -> UpdateBound:
        """How far a round of the study can move them."""
        return self._method.update_bound(self.own_bound)

    def bound_after(self, own: UpdateBound) -> UpdateBound:
        """How far it can move them where every site's steps go as far as `own`."""
        return self._method.update_bound(own)

    @property
    def folded(self) -> frozenset[str]:
        """The shared tensors that are weights with something folded into them."""
        return frozenset(filter(is_folded, self._policy.names("shared")))

    def other_moves(self, reach: Callable[[str], float]) -> dict[str, float]:
        """How far, in length, a round moves what is folded and what is drawn anew (`Method.other_moves`)."""
        ranks = {p.name: p.info.shape[0] for p in self._model_context.parameters if is_first_factor(p.name)}
        return {
            name: length * (abs(folded_scale(self._model_context.model, name)) if is_folded(name) else 1.0)
            for name, length in self._method.other_moves(ranks, reach).items()
        }

    @property
    def own_bound(self) -> UpdateBound:
        """How far the steps of one site go in a round."""
        return local_bound(self._local)

    @property
    def least_weights(self) -> dict[str, float]:
        """The smallest weights that the site can have in a round, known before it trains."""
        return self._method.least_weights(self._samples, self._groups)
