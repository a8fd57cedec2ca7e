"""How far a global model may have moved since a site last saw it, as far as the study's optimisers explain it.

A site keeps no copy of the model it saw. It keeps a sketch of every tensor, 128 sums over the tensor's values with
random signs, from which the length of a difference can be told (Alon, Matias & Szegedy, STOC 1996). The signs come
from a secret of the site: nobody can move a model where the sketch does not look. Torch-free.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from wardround.protection.lint import Finding
from wardround.study.schema import Local

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

BUCKETS = 128
# Values of a tensor whose signs are kept between rounds: of small ones, drawing them takes most of the time.
_KEPT = 4096
# A length told by 128 buckets has a relative standard deviation of 1/16: this is eight of them above.
_SLACK = 1.5
# Times as far as a site's own training went may those of the others have gone.
_OTHERS = 20.0
# A model that should not have moved at all may differ by what processors make of the same initialisation.
_STILL = 1e-3


@dataclass(frozen=True)
class UpdateBound:
    """The most that a tensor can move: `value` in the root mean square of its values, `norm` in length, and `decay`
    times its own length on top. Infinite where nobody can say.
    """

    value: float = math.inf
    norm: float = math.inf
    decay: float = 0.0

    def times(self, factor: float) -> UpdateBound:
        """So many times as far."""
        return UpdateBound(self.value * factor, self.norm * factor, self.decay * factor)

    def of(self, size: int, length: float) -> float:
        """The length by which a tensor of `size` values and of that length can move."""
        return min(self.value * math.sqrt(size), self.norm) + self.decay * length

    def of_one(self, length: float) -> float:
        """How far one value of a tensor of that length can move, where `value` holds for each of them."""
        return min(self.value, self.norm) + self.decay * length


UNKNOWN = UpdateBound()


def local_bound(local: Local) -> UpdateBound:
    """How far a site's own steps of one round can move the model.

    A step of Adam moves no value by more than lr |m| / sqrt(v), and m and v are means of the same gradients
    (`adam_ratio`); a clipped gradient moves the whole model by its clip. SGD without a clip has no limit, and neither
    have passes: a site does not know how many steps those of the others are.
    """
    if local.passes is not None:
        return UNKNOWN
    steps = local.lr * local.steps
    if local.optimizer == "sgd":
        if local.clip_norm is None:
            return UNKNOWN
        gain = steps / (1.0 - local.momentum)
        return UpdateBound(norm=gain * local.clip_norm, decay=gain * local.weight_decay)
    if local.optimizer_state == "keep":
        moved = steps * _largest_ratio()
    else:
        moved = local.lr * _from_rest(local.steps)
    return UpdateBound(value=moved, decay=steps * local.weight_decay if local.optimizer == "adamw" else 0.0)


def adam_ratio(step: int | None = None, beta1: float = 0.9, beta2: float = 0.999) -> float:
    """The largest |m| / sqrt(v) of Adam's means, by Cauchy's inequality: at a step with bias correction, or ever.

    m = (1 - b1) sum b1^k g_k and v = (1 - b2) sum b2^k g_k^2, so
    |m| <= (1 - b1) / sqrt(1 - b2) sqrt(sum (b1^2/b2)^k v).
    Infinite where b1^2 >= b2 and no step is given.
    """
    q = beta1**2 / beta2
    if step is None:
        return (1.0 - beta1) / math.sqrt((1.0 - beta2) * (1.0 - q)) if q < 1.0 else math.inf
    total = (1.0 - q**step) / (1.0 - q) if q != 1.0 else float(step)
    ratio = (1.0 - beta1) * math.sqrt(total / (1.0 - beta2))
    return ratio * math.sqrt(1.0 - beta2**step) / (1.0 - beta1**step)


@lru_cache(maxsize=8)
def _from_rest(steps: int) -> float:
    """The sum of the largest ratios of so many first steps: asked for again in every round."""
    return sum(adam_ratio(step) for step in range(1, steps + 1))


def _largest_ratio() -> float:
    """The most at any step: the bias correction of the first ones is below one."""
    return max(1.0, adam_ratio())


class Sketcher:
    """Sketches tensors with signs that only the holder of `secret` knows."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._drawn: dict[tuple[str, int], Floats] = {}

    def sketch(self, name: str, tensor: Array) -> Floats:
        """The sums of a tensor: (128,), or its values where it has no more of them."""
        flat = np.asarray(tensor, np.float64).reshape(-1)
        if flat.size <= BUCKETS:
            return flat
        signs = self._drawn.get((name, flat.size))
        if signs is None:
            signs = self._signs(name, flat.size)
            if flat.size <= _KEPT:
                self._drawn[name, flat.size] = signs
        padded = np.zeros(-(-flat.size // BUCKETS) * BUCKETS)
        np.multiply(flat, signs, out=padded[: flat.size])
        sums: Floats = padded.reshape(-1, BUCKETS).sum(axis=0)
        return sums

    def _signs(self, name: str, size: int) -> Floats:
        seed = hashlib.sha256(self._secret + name.encode()).digest()
        random = np.random.Generator(np.random.Philox(key=int.from_bytes(seed[:16], "little")))
        bits = np.unpackbits(np.frombuffer(random.bytes(-(-size // 8)), np.uint8), count=size)
        return bits.astype(np.float64) * 2.0 - 1.0


@dataclass(frozen=True)
class Seen:
    """What a site remembers of the model of a round: a sketch of every tensor, and what rounding may have added to it
    in one round since (the root mean square of its values).

    `own` is the furthest that its own training of a round has moved each tensor, in length.
    """

    round: int
    sketches: Mapping[str, Floats]
    rounding: Mapping[str, float]
    own: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As the site's store keeps it."""
        sketches = {
            name: base64.b64encode(sketch.astype("<f4").tobytes()).decode() for name, sketch in self.sketches.items()
        }
        return {"round": self.round, "sketches": sketches, "rounding": dict(self.rounding), "own": dict(self.own)}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Seen:
        """What `to_json` made."""
        sketches = {
            name: np.frombuffer(base64.b64decode(octets), "<f4").astype(np.float64)
            for name, octets in value["sketches"].items()
        }
        return Seen(int(value["round"]), sketches, dict(value["rounding"]), dict(value.get("own", {})))


def witnessed(own: Mapping[str, float], sizes: Mapping[str, int], name: str) -> UpdateBound:
    """How far a round moves a tensor by what a site's own training showed, where the optimiser has no limit.

    Other sites may have gone further: up to `_OTHERS` times, which is also what the whole model's mean change gives a
    tensor that stood still here.
    """
    everything = math.sqrt(sum(length**2 for length in own.values()) / max(1, sum(sizes[n] for n in own)))
    return UpdateBound(norm=_OTHERS * max(own.get(name, 0.0), everything * math.sqrt(sizes[name])))


def drift(
    seen: Seen,
    tensors: Mapping[str, Array],
    number: int,
    update_bound: UpdateBound | Mapping[str, UpdateBound],
    sketch: Callable[[str], Floats],
) -> Iterator[Finding]:
    """Which tensors of the model of round `number` moved further than the rounds in between can have moved them.

    `update_bound` is how far one of those goes: the study's optimisers, or of each tensor what the site itself knows.
    `sketch` gives what a `Sketcher` makes of a tensor.
    """
    rounds = max(0, number - seen.round)
    if rounds and update_bound == UNKNOWN:
        return
    for name, before in seen.sketches.items():
        tensor = np.asarray(tensors[name], np.float64)
        length = float(np.linalg.norm(tensor))
        moved = float(np.linalg.norm(sketch(name) - before))
        one = update_bound if isinstance(update_bound, UpdateBound) else update_bound[name]
        each = one.of(tensor.size, length) + seen.rounding.get(name, 0.0) * math.sqrt(tensor.size)
        most = _SLACK * rounds * each if rounds else 0.0
        if moved > most + _STILL * length + 1e-6 * math.sqrt(tensor.size):
            whose = (
                "the study's optimisers reach"
                if isinstance(update_bound, UpdateBound)
                else "what the site saw makes it"
            )
            reachable = f"{whose} {most:.3g} at most" if rounds else "no round lies in between"
            yield Finding("drift", name, f"moved by {moved:.3g} since round {seen.round}, and {reachable}")
