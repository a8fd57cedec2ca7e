"""What a coordinator does of a round in which a stage of the model does not learn: its tensors and scales stay.

Sites send 0 for them. A server optimiser's momentum, and what compression lets wait at a site, would move them all the
same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy.typing as npt

from wardround.learning.methods.method import Writers
from wardround.protection.compression import Codec
from wardround.tasks.stages import Curriculum
from wardround.wire.update import Aggregate, Layout, scale_key

Array = npt.NDArray[Any]


def held(layout: Layout, tensors: Collection[str]) -> frozenset[str]:
    """The names in the global state, and of the scales, of some of a model's tensors."""
    return frozenset(scale_key(g.name, info.name) for g in layout.groups for info in g.tensors if info.name in tensors)


def holding(write: Writers, public: Mapping[str, Array], names: Collection[str]) -> Writers:
    """Writers that write `names` of the state that sites get as `public` has them, whatever a method says."""
    if not names:
        return write
    return Writers(lambda name, tensor: write.public(name, public[name] if name in names else tensor), write.private)


def next_scales(
    codec: Codec, aggregate: Aggregate, curriculum: Curriculum, number: int, *, before: int
) -> tuple[dict[str, float], dict[str, float]]:
    """The scales of the next round and the shares of saturated values, as `Codec.next_scales` says.

    The scale of a tensor that stood still stays. The first round in which a tensor learns is its first round, as the
    study's scale is a guess until then. `before` is the last committed round.
    """
    untouched = curriculum.untouched(before)
    scales, saturated = codec.next_scales(aggregate, first=untouched is None)
    if untouched:
        fresh = held(aggregate.layout, untouched - curriculum.still(number))
        guessed, _ = codec.next_scales(aggregate, first=True)
        scales |= {name: guessed[name] for name in fresh}
    still = held(aggregate.layout, curriculum.still(number))
    return (
        {name: aggregate.scales[name] if name in still else scale for name, scale in scales.items()},
        {name: share for name, share in saturated.items() if name not in still},
    )
