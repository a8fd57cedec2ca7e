"""Fewer bits for an update: what happens to changes before they are encoded, and to their sum after it.

Rotation and subspace are linear and the same at every site, so they commute with the sum, masked or not. Top-k picks
other values at every site: its updates can be summed in the clear only. Whatever is not sent stays at the site and is
added to its next change (error feedback: Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from wardround.protection.rotation import rotate, unrotate
from wardround.study import protection as study
from wardround.wire.random import public_generator
from wardround.wire.scales import next_scales
from wardround.wire.sparse import DENSE, Encoding, Sparse, kept
from wardround.wire.tensors import TensorInfo
from wardround.wire.update import Aggregate, Floats, Group, Layout, scale_key

Array = npt.NDArray[Any]
Changes = Mapping[str, Mapping[str, Array]]
# Where a site's memory holds what it has not sent yet.
RESIDUAL = "residual/"


@dataclass(frozen=True)
class Codec:
    """Sends changes as they are, and is the base of every other.

    `seed` is the study's. Groups named in `whole` are sent as they are by every codec: averages, such as a
    batch norm's variance, of which a part is of no use.
    """

    seed: int = 0
    whole: frozenset[str] = frozenset()
    #: Whether a part of a change waits at the site and is sent in a later round.
    lags: ClassVar[bool] = False
    #: Whether values are sent rotated: one of them may then be as large as its whole tensor.
    turns: ClassVar[bool] = False

    @property
    def form(self) -> Encoding:
        """The form of an update on the wire."""
        return DENSE

    def sent(self, layout: Layout) -> Layout:
        """The layout of what is encoded and summed, from the one of the method's groups."""
        return layout

    def count(self, group: str, size: int) -> int:
        """How many values a site says of a tensor of a sent layout."""
        return size

    def compress(
        self, number: int, changes: Changes, memory: Mapping[str, Array], limits: Mapping[str, float]
    ) -> tuple[Changes, dict[str, Array]]:
        """What is encoded of round `number`'s changes, and what the site keeps of them in its memory, never sent.

        `limits` are the largest values that each tensor of the sent layout can say (`wire.update.limits`).
        """
        return changes, {}

    def lost(self, limits: Mapping[str, float], residual: Mapping[str, Array]) -> Mapping[str, float]:
        """Of the `limits` of what is encoded, those beyond which a value of the method's change is lost for good.

        `residual` is what the site keeps of the round's changes.
        """
        return limits

    def restore(self, number: int, layout: Layout, aggregate: Aggregate) -> Aggregate:
        """The sum of the sites' changes in the method's layout, from the sum of what they sent."""
        return aggregate

    def next_scales(self, aggregate: Aggregate, *, first: bool) -> tuple[dict[str, float], dict[str, float]]:
        """The scales of the next round and the shares of saturated values (`wire.scales.next_scales`)."""
        return next_scales(aggregate, self.count, first=first)

    def signs(self, number: int, group: str, tensor: str) -> np.random.Generator:
        """Public randomness for the rotation of a tensor in a round, the same at every site and at the coordinator."""
        return public_generator(self.seed, number, "rotation", group, tensor)


PLAIN = Codec()


@dataclass(frozen=True)
class RotationCodec(Codec):
    """Rotates each tensor, so that no large value makes the steps of all others coarse; shapes stay."""

    turns = True

    def compress(
        self, number: int, changes: Changes, memory: Mapping[str, Array], limits: Mapping[str, float]
    ) -> tuple[Changes, dict[str, Array]]:
        """The rotated changes."""

        def turned(group: str, name: str, change: Array) -> Array:
            return rotate(change, self.signs(number, group, name)).astype(change.dtype).reshape(change.shape)

        return _each(changes, self.whole, turned), {}

    def lost(self, limits: Mapping[str, float], residual: Mapping[str, Array]) -> Mapping[str, float]:
        """Of groups that are sent as they are: of a rotated tensor, what is cut off is spread over all of it."""
        return {key: limit for key, limit in limits.items() if key.partition("/")[0] in self.whole}

    def restore(self, number: int, layout: Layout, aggregate: Aggregate) -> Aggregate:
        """The sum, rotated back."""

        def back(group: str, info: TensorInfo, sums: Floats) -> Floats:
            return unrotate(sums, self.signs(number, group, info.name))

        return Restored(aggregate, layout, self.whole, back)


@dataclass(frozen=True)
class _Feedback(Codec):
    """Sends a part of change and residual, and keeps the rest."""

    ratio: float = 1.0
    lags = True

    def compress(
        self, number: int, changes: Changes, memory: Mapping[str, Array], limits: Mapping[str, float]
    ) -> tuple[Changes, dict[str, Array]]:
        """The part of change and residual that is sent, and the new residual."""
        residual: dict[str, Array] = {}

        def part(group: str, name: str, change: Array) -> Array:
            if kept(change.size, self.ratio) == change.size:
                return change
            key = RESIDUAL + scale_key(group, name)
            whole = change + memory[key] if key in memory else change
            limit = limits[scale_key(group, name)]
            sent, residual[key] = self._split(number, group, name, whole, limit)
            return sent

        return _each(changes, self.whole, part), residual

    def lost(self, limits: Mapping[str, float], residual: Mapping[str, Array]) -> Mapping[str, float]:
        """Of tensors of which nothing waits: the others keep what is cut off."""
        return {key: limit for key, limit in limits.items() if RESIDUAL + key not in residual}

    def _split(self, number: int, group: str, name: str, whole: Array, limit: float) -> tuple[Array, Array]:
        """What is sent of a tensor, and the rest of it in its own shape, with what the limit will cut off."""
        raise NotImplementedError


@dataclass(frozen=True)
class SubspaceCodec(_Feedback):
    """Sends a random part of each rotated tensor's coordinates: a projection on a random subspace, new every round."""

    def sent(self, layout: Layout) -> Layout:
        """The layout with each cut tensor as a vector of its coordinates."""
        return replace(layout, groups=tuple(self._cut(group) for group in layout.groups))

    def restore(self, number: int, layout: Layout, aggregate: Aggregate) -> Aggregate:
        """The sum of the projections, in the model's shapes."""

        def back(group: str, info: TensorInfo, sums: Floats) -> Floats:
            return sums if sums.size == info.size else self._lift(number, group, info.name, sums, info.size)

        return Restored(aggregate, layout, self.whole, back)

    def _cut(self, group: Group) -> Group:
        if group.name in self.whole:
            return group
        return replace(group, tensors=tuple(self._coordinates(info) for info in group.tensors))

    def _coordinates(self, info: TensorInfo) -> TensorInfo:
        count = kept(info.size, self.ratio)
        return info if count == info.size else replace(info, shape=(count,))

    def _split(self, number: int, group: str, name: str, whole: Array, limit: float) -> tuple[Array, Array]:
        turned = rotate(whole, self.signs(number, group, name))
        sent = turned[self._chosen(number, group, name, whole.size)].astype(whole.dtype)
        heard = np.clip(sent, -limit, limit)
        projection = self._lift(number, group, name, heard, whole.size).reshape(whole.shape)
        return sent, (whole - projection).astype(whole.dtype)

    def _lift(self, number: int, group: str, name: str, sent: Array, size: int) -> Floats:
        """The point of the subspace with these coordinates: (size,)."""
        turned = np.zeros(size)
        turned[self._chosen(number, group, name, size)] = sent
        return unrotate(turned, self.signs(number, group, name))

    def _chosen(self, number: int, group: str, name: str, size: int) -> Array:
        random = public_generator(self.seed, number, "subspace", group, name)
        return np.sort(random.choice(size, kept(size, self.ratio), replace=False, shuffle=False))


@dataclass(frozen=True)
class TopKCodec(_Feedback):
    """Sends the largest values of each tensor, with their places."""

    @property
    def form(self) -> Encoding:
        """Places and values."""
        return Sparse(self.ratio, self.whole)

    def count(self, group: str, size: int) -> int:
        """How many values a site says of a tensor."""
        return size if group in self.whole else kept(size, self.ratio)

    def _split(self, number: int, group: str, name: str, whole: Array, limit: float) -> tuple[Array, Array]:
        flat, count = whole.reshape(-1), kept(whole.size, self.ratio)
        largest = np.argpartition(np.abs(flat), -count)[-count:]
        sent = np.zeros_like(flat)
        sent[largest] = flat[largest]
        rest = flat - np.clip(sent, -limit, limit)
        return sent.reshape(whole.shape), rest.reshape(whole.shape)


def build_codec(config: study.Compression, seed: int, whole: frozenset[str] = frozenset()) -> Codec:
    """The codec that a study asks for."""
    match config:
        case study.Rotation():
            return RotationCodec(seed, whole)
        case study.Subspace():
            return SubspaceCodec(seed, whole, config.ratio)
        case study.TopK():
            return TopKCodec(seed, whole, config.ratio)
        case study.NoCompression():
            return Codec(seed, whole)


def _each(changes: Changes, whole: frozenset[str], work: Callable[[str, str, Array], Array]) -> Changes:
    return {
        group: {name: t if group in whole else work(group, name, t) for name, t in tensors.items()}
        for group, tensors in changes.items()
    }


Decode = Callable[[str, TensorInfo, Floats], Floats]


class Restored(Aggregate):
    """A sum as methods see it: counts, weights and metrics as they are, tensors decoded one at a time."""

    def __init__(self, sent: Aggregate, layout: Layout, whole: frozenset[str], decode: Decode) -> None:
        self.layout = layout
        self.scales = sent.scales
        self.contributors = sent.contributors
        self.saturated = sent.saturated
        self.metrics = sent.metrics
        self._sent = sent
        self._decode = decode
        self._infos = {(g.name, info.name): info for g in layout.groups for info in g.tensors}
        self._whole = whole

    def steps(self, group: str) -> int:
        """The sum of the sites' weights, in whole steps."""
        return self._sent.steps(group)

    def weight(self, group: str) -> float:
        """The sum of the sites' weights."""
        return self._sent.weight(group)

    def total(self, group: str, tensor: str) -> Floats:
        """The sum over sites of w / max_weight x delta."""
        return self._decoded(group, tensor, self._sent.total(group, tensor))

    def peak(self, group: str, tensor: str) -> float:
        """The largest magnitude in `total`."""
        return float(np.abs(self.total(group, tensor)).max(initial=0.0))

    def mean(self, group: str, tensor: str) -> Floats:
        """The weighted mean of the sites' changes; raises `Rejected` when all weights are zero."""
        return self._decoded(group, tensor, self._sent.mean(group, tensor))

    def _decoded(self, group: str, tensor: str, sums: Floats) -> Floats:
        info = self._infos[group, tensor]
        return sums if group in self._whole else self._decode(group, info, sums).reshape(info.shape)
