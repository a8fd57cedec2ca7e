"""What was folded into layers' weights, as tensors of a global state: each is written once and never changes.

    adapters/folded/3      what a round folded into all layers: of each its left (d, c) and right factor (c, *inputs)
    adapters/folded/2      what an earlier one did
    adapters/folded/whole  what all rounds before that did: of each layer a weight (d, *inputs)

The newest stands first. As soon as the factors hold more values than the layers' weights, the sum of all takes their
place: over many rounds a site gets at most twice what the rounds fold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from wardround.errors import Rejected
from wardround.learning.methods.method import MODEL, Array, Floats, state_name
from wardround.models.low_rank import is_first_factor, second_of
from wardround.wire.bill import ADAPTERS
from wardround.wire.tensors import TensorInfo

_PARTS = state_name(ADAPTERS, "folded/")
_WHOLE = f"{_PARTS}whole"


def is_part(name: str) -> bool:
    """Whether a tensor of a global state is what was folded."""
    return name.startswith(_PARTS)


@dataclass(frozen=True)
class Product:
    """`left` (d, r) times `right` (r, *inputs), what a layer of a weight (d, *inputs) is changed by."""

    left: Floats
    right: Floats

    def whole(self) -> Floats:
        """The weight's change: (d, *inputs)."""
        flat = self.right.reshape(len(self.right), int(np.prod(self.right.shape[1:])))
        found: Floats = (self.left @ flat).reshape(len(self.left), *self.right.shape[1:])
        return found


@dataclass(frozen=True)
class LayerShape:
    """A layer with a product: the name of its first factor (rank, *inputs), and the `outputs` of the second."""

    first: str
    rank: int
    inputs: tuple[int, ...]
    outputs: int

    @property
    def width(self) -> int:
        """Values of an input."""
        return int(np.prod(self.inputs))

    @property
    def values(self) -> int:
        """Values of its weight."""
        return self.outputs * self.width

    def factors(self, times: int) -> int:
        """Values of a product of `times` its rank in columns."""
        return times * self.rank * (self.outputs + self.width)


@dataclass(frozen=True)
class Folded:
    """The layers of a global state, in its order, and the tensors that hold what was folded into them, in theirs."""

    layers: tuple[LayerShape, ...]
    parts: Mapping[str, Array]

    @staticmethod
    def of(public: Mapping[str, Array]) -> Folded:
        """What a global state says."""
        layers, prefix = [], state_name(MODEL, "")
        for name in public:
            if name.startswith(prefix) and is_first_factor(name):
                first = public[name].shape
                outputs = public[second_of(name)].shape[0]
                layers.append(LayerShape(name.removeprefix(prefix), first[0], first[1:], outputs))
        return Folded(tuple(layers), {name: public[name] for name in public if is_part(name)})

    @property
    def values(self) -> int:
        """Values of all layers' weights."""
        return sum(layer.values for layer in self.layers)

    @property
    def _factors(self) -> int:
        """Values of all factors."""
        return sum(part.size for name, part in self.parts.items() if name != _WHOLE)

    def part_of(self, terms: int) -> tuple[TensorInfo, ...]:
        """The tensor of a round that folds `terms` products of the factors' rank; none where it folds nothing."""
        size = sum(layer.factors(terms) for layer in self.layers)
        if size > self.values:
            return (TensorInfo(_WHOLE, "float32", (self.values,)),)
        return (TensorInfo(f"{_PARTS}1", "float32", (size,)),) if size else ()

    def begun_with(self, weights: Sequence[Floats]) -> Folded:
        """With these weights, one a layer, in place of all that was folded."""
        return replace(self, parts={_WHOLE: _flat(weights)})

    def plus(self, products: Sequence[Product]) -> Folded:
        """With one more round's products, one a layer."""
        new = _flat([factor for product in products for factor in (product.left, product.right)])
        if not new.size:
            return self
        numbers = [int(name.removeprefix(_PARTS)) for name in self.parts if name != _WHOLE]
        longer = replace(self, parts={f"{_PARTS}{max(numbers, default=0) + 1}": new, **self.parts})
        return longer if longer._factors <= self.values else longer.begun_with(longer.weights())

    def check(self) -> None:
        """Raise `Rejected` for a state that no round makes."""
        if self._factors > self.values:
            raise Rejected("more is folded into layers than their weights hold")

    def weights(self) -> list[Floats]:
        """The sum of all that was folded, (outputs, *inputs) of each layer; the oldest is added first.

        Raises `Rejected` for what is cut elsewhere than the layers.
        """
        total = [np.zeros((layer.outputs, *layer.inputs)) for layer in self.layers]
        for name, part in reversed(list(self.parts.items())):
            for weight, change in zip(total, self._changes(name, part), strict=True):
                weight += change
        return total

    def _changes(self, name: str, part: Array) -> list[Floats]:
        """What one tensor adds to each layer."""
        flat, at, changes = part.reshape(-1).astype(np.float64), 0, []
        one = sum(layer.factors(1) for layer in self.layers)
        times, left = divmod(flat.size, one) if name != _WHOLE else (0, flat.size - self.values)
        if left or part.dtype != np.float32:
            raise Rejected(f"what is folded is cut elsewhere than the study's layers: {name[:80]!r}")
        for layer in self.layers:
            columns = times * layer.rank
            if name == _WHOLE:
                changes.append(flat[at : at + layer.values].reshape(layer.outputs, *layer.inputs))
                at += layer.values
                continue
            between, end = at + layer.outputs * columns, at + layer.factors(times)
            factors = flat[at:between].reshape(layer.outputs, columns), flat[between:end]
            changes.append(Product(factors[0], factors[1].reshape(columns, *layer.inputs)).whole())
            at = end
        return changes


def _flat(arrays: Sequence[Floats]) -> Array:
    """All values in one row, in 32 bits."""
    return np.concatenate([np.zeros(0), *(array.reshape(-1) for array in arrays)]).astype(np.float32)
