"""Methods that average low-rank products exactly, and fold what factors cannot say into the layers' weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from wardround.errors import StudyError
from wardround.learning.methods.method import Array, Changes, Floats, LocalRound, Method, Updates, Writers, state_name
from wardround.learning.policy import Parameter, Policy
from wardround.models.low_rank import folded_of, is_first_factor, is_folded, second_of
from wardround.study.methods import MethodSettings
from wardround.wire.update import Aggregate, Group

_FOLDED = "folded"


@dataclass(frozen=True)
class Product:
    """`left` (d, r) times `right` (r, *inputs), what a layer of a weight (d, *inputs) is changed by."""

    left: Floats
    right: Floats

    def plus(self, other: Product) -> Product:
        """The sum of both: the columns of one beside those of the other, and the rows below each other."""
        return Product(np.concatenate([self.left, other.left], axis=1), np.concatenate([self.right, other.right]))

    def whole(self) -> Floats:
        """The weight's change: (d, *inputs)."""
        flat = self.right.reshape(len(self.right), int(np.prod(self.right.shape[1:])))
        found: Floats = (self.left @ flat).reshape(len(self.left), *self.right.shape[1:])
        return found


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

    def means(self) -> tuple[Floats, Floats]:
        """The mean of each factor."""
        return np.tensordot(self.parts, self.a, axes=1), np.tensordot(self.parts, self.b, axes=1)


@dataclass(frozen=True)
class Folding(Method):
    """Every round, the layers' weights change by the mean of the sites' products, to rounding.

    What a derived method's next factors do not say of it is folded into the weight of the layer: sites get it beside
    the factors, as one product of many columns, or as a whole weight where that is smaller. The base weights stay the
    file that they are.
    """

    needs: ClassVar[Literal["sum", "updates"]] = "updates"

    @abstractmethod
    def next_factors(
        self, name: str, found: Factors, private: Mapping[str, Array], write: Writers
    ) -> tuple[Floats, Floats]:
        """The factors a (r, *inputs) and b (d, r) with which the next round begins; `name` is that of `a`."""

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
        for name, weight in values.items():
            if is_folded(name):
                columns = len(weight) if weight.any() else 0
                public |= _stored(name, Product(np.eye(len(weight))[:, :columns], weight[:columns].astype(np.float64)))
        return public, private

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
        folded: dict[str, Array] = {}
        following: dict[str, Array] = {}
        for group in aggregate.layout.groups:
            for info in group.tensors:
                name = state_name(group.name, info.name)
                if is_first_factor(info.name):
                    following |= self._next(group.name, info.name, public, private, aggregate, write, folded)
                if name in following:
                    write.public(name, following.pop(name))
                else:
                    super().apply_group(replace(group, tensors=(info,)), public, private, aggregate, write)
        # In the order in which the state began.
        for name in public:
            if name in folded:
                write.public(name, folded[name])

    def _next(
        self,
        group: str,
        first: str,
        public: Mapping[str, Array],
        private: Mapping[str, Array],
        aggregate: Updates,
        write: Writers,
        folded: dict[str, Array],
    ) -> dict[str, Array]:
        """Both factors as the next state has them; what they leave out of the mean product goes into `folded`."""
        second, layer = second_of(first), folded_of(first)
        at_first, at_second = state_name(group, first), state_name(group, second)
        b = public[at_second] + aggregate.each(group, second)
        found = Factors(aggregate.parts(group), public[at_first] + aggregate.each(group, first), b.reshape(b.shape[:3]))
        next_a, next_b = self.next_factors(first, found, private, write)
        kept_a, kept_b = next_a.astype(np.float32), next_b.astype(np.float32)
        left = found.mean_product()
        if kept_b.any():
            # Of the factors as they are stored, so that their rounding is folded, too.
            left = left.plus(Product(-kept_b.astype(np.float64), kept_a.astype(np.float64)))
        folded |= _stored(layer, _restored(layer, public).plus(left))
        return {at_first: kept_a, at_second: kept_b.reshape(public[at_second].shape)}

    def release_for(
        self, site: str | None, public: Mapping[str, Array], private: Mapping[str, Array]
    ) -> dict[str, Array]:
        """With what is folded into every layer, as a whole weight."""
        released = super().release_for(site, public, private)
        prefix, end = state_name(_FOLDED, ""), "/right"
        names = [n.removeprefix(prefix).removesuffix(end) for n in public if n.startswith(prefix) and n.endswith(end)]
        return released | {name: _restored(name, public).whole().astype(np.float32) for name in names}


def _stored(name: str, product: Product) -> dict[str, Array]:
    """A product as it stands in the state: of as few values as it can have."""
    d, columns = product.left.shape
    inputs = int(np.prod(product.right.shape[1:]))
    if columns > min(d, inputs):
        # One factor is the identity, which costs less than the columns.
        whole = product.whole()
        product = (
            Product(np.eye(d), whole)
            if d <= inputs
            else Product(whole.reshape(d, inputs), np.eye(inputs).reshape(inputs, *product.right.shape[1:]))
        )
    at = state_name(_FOLDED, name)
    return {f"{at}/left": product.left.astype(np.float32), f"{at}/right": product.right.astype(np.float32)}


def _restored(name: str, public: Mapping[str, Array]) -> Product:
    at = state_name(_FOLDED, name)
    return Product(public[f"{at}/left"].astype(np.float64), public[f"{at}/right"].astype(np.float64))


class FoldingSettings(MethodSettings):
    """A method of low-rank products that needs each site's factors."""

    folds = True
    weights: Literal["samples", "equal"] = "samples"
