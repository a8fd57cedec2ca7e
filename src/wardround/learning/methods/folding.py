"""Methods that average low-rank products exactly, and fold what factors cannot say into the layers' weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from wardround.errors import StudyError
from wardround.learning.methods.folded import Folded, Product, is_part
from wardround.learning.methods.method import (
    Array,
    Changes,
    Floats,
    LocalRound,
    Method,
    Updates,
    Writers,
    state_name,
)
from wardround.learning.policy import Parameter, Policy
from wardround.models.low_rank import folded_of, is_first_factor, is_folded, second_of
from wardround.study.methods import MethodSettings
from wardround.wire.tensors import TensorInfo, joined
from wardround.wire.update import Aggregate, Group


@dataclass(frozen=True)
class Factors:
    """Both factors of a product at every site: `a` (n, r, *inputs), `b` (n, d, r); `parts` (n,) are their shares."""

    parts: Floats
    a: Floats
    b: Floats

    def mean_product(self) -> Product:
        """The mean of the sites' products, as one of n r columns."""
        weighted = self.parts[:, None, None] * self.b
        left = weighted.transpose(1, 0, 2).reshape(self.b.shape[1], -1)
        return Product(left, self.a.reshape(-1, *self.a.shape[2:]))

    def spread(self) -> Product:
        """The mean product less the product of the means, as one of (n - 1) r columns.

        That is the mean of (b_i - mean b)(a_i - mean a), whose left factors add up to 0: one of them says nothing new.
        """
        apart = self.b - np.tensordot(self.parts, self.b, axes=1)
        return Factors(self.parts[:-1], self.a[:-1] - self.a[-1], apart[:-1]).mean_product()

    def means(self) -> tuple[Floats, Floats]:
        """The mean of each factor."""
        return np.tensordot(self.parts, self.a, axes=1), np.tensordot(self.parts, self.b, axes=1)


@dataclass(frozen=True)
class Folding(Method):
    """Every round, the layers' weights change by the mean of the sites' products, to rounding.

    What a derived method's next factors do not say of it is folded into the weight of the layer. Sites get it beside
    the factors (`Folded`): what a round folds is a tensor of its own, which never changes, so that a site which keeps
    it gets it once. The base weights stay the file that they are.
    """

    needs: ClassVar[Literal["sum", "updates"]] = "updates"

    @abstractmethod
    def next_factors(
        self, name: str, found: Factors, private: Mapping[str, Array], write: Writers
    ) -> tuple[Floats, Floats]:
        """The factors a (r, *inputs) and b (d, r) with which the next round begins; `name` is that of `a`."""

    @abstractmethod
    def left_over(self, found: Factors) -> Product:
        """What the next factors do not say of the mean product, as one of n r columns for the same n in all layers."""

    @abstractmethod
    def terms(self, sites: int) -> int:
        """The number of products of the factors' rank in it, for that number of sites."""

    def added(self, public: Mapping[str, Array], sites: int) -> tuple[TensorInfo, ...]:
        """What the round folds, as long as factors are smaller than weights."""
        return Folded.of(public).part_of(self.terms(sites))

    def policy(self, parameters: tuple[Parameter, ...]) -> Policy:
        """Raises `StudyError` where not both factors of a product are trained."""
        trained = {p.name for p in parameters if p.trainable}
        first = [p.name for p in parameters if is_first_factor(p.name)]
        if not first or not trained.issuperset([*first, *map(second_of, first)]):
            raise StudyError(
                f"{type(self).__name__} averages products of two trained factors; set adapters.kind: lora and "
                "adapters.factors: both"
            )
        return super().policy(parameters)

    def groups(self, shared: tuple[Parameter, ...], ring_bits: int) -> tuple[Group, ...]:
        """What is folded is the coordinator's to say: it is in no update."""
        return super().groups(tuple(p for p in shared if not is_folded(p.name)), ring_bits)

    def initial(
        self, groups: tuple[Group, ...], values: Mapping[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Nothing is folded yet, unless the study starts from a release of such a method."""
        public, private = super().initial(groups, values)
        folded = Folded.of(public)
        weights = [values[folded_of(layer.first)].astype(np.float64) for layer in folded.layers]
        if any(weight.any() for weight in weights):
            public |= folded.begun_with(weights).parts
        return public, private

    def lasting(self, names: Sequence[str]) -> tuple[str, ...]:
        """What was folded, the newest first."""
        return tuple(name for name in names if is_part(name))

    def changes(self, local: LocalRound) -> Changes:
        """The factors' changes, and those of whatever else is trained."""
        return {
            group: {name: tensor for name, tensor in part.items() if not is_folded(name)}
            for group, part in super().changes(local).items()
        }

    def apply(
        self, public: Mapping[str, Array], private: Mapping[str, Array], aggregate: Aggregate, write: Writers
    ) -> None:
        """Factors by `next_factors`, with what they leave folded; all else is averaged."""
        assert isinstance(aggregate, Updates), "needs = updates"
        products: list[Product] = []
        following: dict[str, Array] = {}
        for group in aggregate.layout.groups:
            for info in group.tensors:
                name = state_name(group.name, info.name)
                if is_first_factor(info.name):
                    following |= self._next(group.name, info.name, public, private, aggregate, write, products)
                if name in following:
                    write.public(name, following.pop(name))
                else:
                    super().apply_group(replace(group, tensors=(info,)), public, private, aggregate, write)
        for name, part in Folded.of(public).plus(products).parts.items():
            write.public(name, part)

    def _next(
        self,
        group: str,
        first: str,
        public: Mapping[str, Array],
        private: Mapping[str, Array],
        aggregate: Updates,
        write: Writers,
        products: list[Product],
    ) -> dict[str, Array]:
        """Both factors as the next state has them; what they leave out of the mean product is added to `products`."""
        second = second_of(first)
        at_first, at_second = state_name(group, first), state_name(group, second)
        b = public[at_second] + aggregate.each(group, second)
        found = Factors(aggregate.parts(group), public[at_first] + aggregate.each(group, first), b.reshape(b.shape[:3]))
        next_a, next_b = self.next_factors(first, found, private, write)
        products.append(self.left_over(found))
        shape = public[at_second].shape
        return {at_first: next_a.astype(np.float32), at_second: next_b.astype(np.float32).reshape(shape)}

    def folds_as(self, known: type[Folding]) -> bool:
        """Whether a round folds as in the class `known`: nothing derived from it changes how."""
        hooks = ("next_factors", "left_over")
        return self.moves_as(known) and all(getattr(type(self), hook) is getattr(known, hook) for hook in hooks)

    def release_for(
        self, site: str | None, public: Mapping[str, Array], private: Mapping[str, Array]
    ) -> Mapping[str, Array]:
        """With what is folded into every layer, as a whole weight. Raises `Rejected` for what no round folds."""
        folded = Folded.of(public)
        folded.check()
        weights = zip(folded.layers, folded.weights(), strict=True)
        released = super().release_for(site, public, private)
        return joined(released, {folded_of(layer.first): weight.astype(np.float32) for layer, weight in weights})


class FoldingSettings(MethodSettings):
    """A method of low-rank products that needs each site's factors."""

    folds = True
    weights: Literal["samples", "equal"] = "samples"
