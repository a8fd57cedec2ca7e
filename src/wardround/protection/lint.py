"""Signs in a model's weights that it was built to make updates speak: what a site looks for before it trains.

A secure sum does not stop a malicious model: one that lets every image leave its own trace in the gradient keeps doing
so under masks. What gives such models away is in their weights. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import betainc, ndtr

from wardround.wire.canonical import digest

Array = npt.NDArray[Any]

LARGEST_GAIN = 1e3
# Fewer rows or biases than these make no imprint worth having, and chance could line them up.
_ROWS, _BIASES = 8, 16
# Cosines from which on rows are alike, by the values of a row. Rows of 16 values that were trained honestly stay below
# 0.97, as chance does by far; so a trap cannot hide behind a little noise. Rows of few values come near by chance.
_SAME = ((32, 0.98), (16, 0.99), (0, 0.999))
# Rows of two layers in a row come nearer to each other: few directions are worth learning. Fewer twins say nothing.
_SAME_OF_TWO, _TWINS_OF_TWO = 0.999, 8
# Columns that stand for the inputs of a wide layer, drawn at random once and for all.
_PROJECTED = 256
_DRIFT = 6.0  # standard deviations of a count
_FILTER = 27  # values of a depthwise filter at most: 5 x 5, 3 x 3 x 3
_EVEN = 0.1  # coefficient of variation of the gaps between sorted biases; about 1 for random ones
_AMPLIFIED = 10.0  # times the median row


@dataclass(frozen=True)
class Finding:
    """One reason not to train on a model."""

    check: str
    tensor: str
    text: str


def architecture_sha256(tensors: Mapping[str, Array]) -> str:
    """The identity of an architecture: sha256 over names, types and shapes, whatever the order."""
    return digest([[name, str(t.dtype), list(t.shape)] for name, t in sorted(tensors.items())])


def lint_against(
    tensors: Mapping[str, Array], approved: Mapping[str, Array], alike: dict[str, int] | None = None
) -> tuple[Finding, ...]:
    """What is suspicious about tensors, given `approved`, the initial ones of the network that a site agreed to.

    Compares the architecture, and looks for values that are not finite, gains above 1e3, layers that imprint (rows
    alike, in one layer or through two, or biases on the even quantiles of a distribution: Fowl et al., "Robbing the
    Fed", ICLR 2022) and output rows that single out a class (Wen et al., "Fishing for user data", ICML 2022). What the
    approved tensors show themselves is no news. Two rows alike are enough where they have none and chance makes none.
    Rows that start at zero are not compared: whatever they learn first is of low rank, and honest. `alike` keeps how
    many rows of `approved` are, for a party that looks at many models of one study.
    """
    other = tuple(_architecture(tensors, approved))
    if other:
        return other
    zero = {name for name, tensor in approved.items() if not tensor.any()}
    found = lint_tensors(tensors, learned_from_zero=zero, approved=approved, alike=alike)
    if not found:
        return ()
    # Of rows, their number has been compared.
    known = {(f.check, f.tensor) for f in lint_tensors(approved) if f.check != "imprint" or approved[f.tensor].ndim < 2}
    return tuple(finding for finding in found if (finding.check, finding.tensor) not in known)


def lint_tensors(
    tensors: Mapping[str, Array],
    *,
    learned_from_zero: Set[str] = frozenset(),
    approved: Mapping[str, Array] | None = None,
    alike: dict[str, int] | None = None,
) -> tuple[Finding, ...]:
    """The checks of `lint_against` that need nothing to compare with; rows may be as alike as those of `approved`."""
    alike = {} if alike is None else alike
    floats = {name: np.asarray(t, np.float64) for name, t in tensors.items() if np.issubdtype(t.dtype, np.floating)}
    found: list[Finding] = []
    whole: dict[str, Array] = {}
    for name, tensor in floats.items():
        largest = float(np.abs(tensor).max(initial=0.0))
        if not math.isfinite(largest):
            found.append(Finding("finite", name, "holds values that are not finite"))
            continue
        found += _gain(name, tensor, largest, floats)
        whole[name] = tensor
        if tensor.ndim >= 2:
            found += _twins(name, tensor, None if approved is None else approved[name], alike)
        else:
            found += _bins(name, tensor)
    named = {finding.tensor for finding in found}
    through = [finding for finding in _through_two(whole, approved, alike) if finding.tensor not in named]
    return (*found, *through, *_fishing(whole, learned_from_zero))


def _architecture(tensors: Mapping[str, Array], approved: Mapping[str, Array]) -> Iterable[Finding]:
    # Not every name of a foreign model is safe to repeat: only those of the approved one are.
    for name in sorted(approved):
        if name not in tensors:
            yield Finding("architecture", name, "is missing")
        elif tensors[name].shape != approved[name].shape or tensors[name].dtype != approved[name].dtype:
            yield Finding("architecture", name, "has another shape or type than in the study's network")
    for name in sorted(tensors.keys() - approved.keys()):
        yield Finding("architecture", name[:80], "is no tensor of the study's network")


def _gain(name: str, tensor: Array, largest: float, tensors: Mapping[str, Array]) -> Iterable[Finding]:
    """What amplifies too much; `largest` is the tensor's value that is furthest from 0."""
    layer, _, kind = name.rpartition(".")
    if kind.startswith("running_"):
        return
    gain = largest
    variance = tensors.get(f"{layer}.running_var") if kind == "weight" else None
    if variance is not None and variance.size and variance.shape == tensor.shape:
        # The most that it can be; NaN, of a variance that is, is looked at below.
        gain /= math.sqrt(max(float(variance.min()), 0.0) + 1e-5)
        if not gain <= LARGEST_GAIN:
            gain = float((np.abs(tensor) / np.sqrt(np.maximum(variance, 0.0) + 1e-5)).max())
    if gain > LARGEST_GAIN:
        limit = f"{LARGEST_GAIN:g} is the most that is allowed (a training that diverged gets there, too)"
        yield Finding("gain", name, f"amplifies by {gain:.3g}; {limit}")


def _twins(name: str, tensor: Array, approved: Array | None, alike: dict[str, int]) -> Iterable[Finding]:
    """Rows of a layer that point the same way, beyond those that the approved tensor and chance have."""
    if tensor.shape[0] < _ROWS or tensor[0].size < 2:
        return
    inputs = tensor[0].size
    same = next(cosine for least, cosine in _SAME if inputs >= least)
    before = None if approved is None else approved.reshape(len(approved), -1)
    rows = tensor.reshape(len(tensor), -1)
    if before is not None:
        rows = rows[before.any(axis=1)]
    if before is not None and name not in alike:
        alike[name] = _alike(before, same)
    twins, known = _alike(rows, same), 0 if before is None else alike[name]
    # A depthwise filter measures a channel of its own. Public weights have many that are alike, of which some cross the
    # limit either way as they are trained. Where an image is grey its first filters look the same, and measure one
    # channel all: those that see a whole patch, as of a transformer, make a trap like any row.
    small = tensor.ndim >= 4 and tensor.shape[1] == 1 and inputs <= _FILTER
    drift = int(_DRIFT * math.sqrt(known)) if small else 0
    if len(rows) >= _ROWS and twins > known + drift + _by_chance(len(rows), inputs, same):
        share = f"{twins / len(rows):.0%} of its rows are alike ({twins})"
        yield Finding("imprint", name, f"{share}: each one would measure the same thing")


def _bins(name: str, tensor: Array) -> Iterable[Finding]:
    if tensor.ndim == 1 and tensor.size >= _BIASES and name.endswith("bias") and _evenly_spaced(tensor):
        yield Finding("imprint", name, "its values lie evenly on a distribution: bins that sort inputs one by one")


def _through_two(
    tensors: Mapping[str, Array], approved: Mapping[str, Array] | None, alike: dict[str, int]
) -> Iterable[Finding]:
    """Rows of two linear layers that are alike when taken together, as where each layer hides what the other undoes."""
    layers = [(name, tensor) for name, tensor in tensors.items() if tensor.ndim == 2]
    for (first, one), (second, two) in pairwise(layers):
        if two.shape[1] != one.shape[0] or two.shape[0] < _ROWS:
            continue
        known = 0
        if approved is not None:
            if not (approved[first].any() and approved[second].any()):
                continue
            both = f"{first} {second}"
            if both not in alike:
                alike[both] = _alike(_product(approved[first], approved[second]), _SAME_OF_TWO)
            known = alike[both]
        twins, rank = _alike(_product(one, two), _SAME_OF_TWO), min(one.shape)
        chance = _by_chance(len(two), rank, _SAME_OF_TWO) if rank > 1 else len(two)
        if twins >= max(_TWINS_OF_TWO, known + chance + 1):
            share = f"{twins / len(two):.0%} of its rows are alike ({twins})"
            yield Finding("imprint", second, f"{share} behind {first}: each one would measure the same thing")


def _product(first: Array, second: Array) -> Array:
    """What two linear layers do to inputs, or to random combinations of them where they are many."""
    one = np.asarray(first, np.float64)
    if one.shape[1] > _PROJECTED:
        one = one @ np.random.Generator(np.random.Philox(0)).standard_normal((one.shape[1], _PROJECTED))
    product: Array = np.asarray(second, np.float64) @ one
    return product


def _alike(rows: Array, same: float) -> int:
    """How many rows have a twin, in direction or against it; a row of zeros says nothing."""
    lengths = np.linalg.norm(np.asarray(rows, np.float64), axis=1)
    # What is left of rows that were decayed to nothing has no direction in float32.
    kept = lengths > np.finfo(np.float32).tiny
    unit = (rows[kept] / lengths[kept, None]).astype(np.float32)
    twins = 0
    for start in range(0, len(unit), 512):
        cosines = np.abs(unit[start : start + 512] @ unit.T)
        np.fill_diagonal(cosines[:, start:], 0.0)
        twins += int((cosines.max(axis=1, initial=0.0) > same).sum())
    return twins


@lru_cache(maxsize=4096)
def _by_chance(rows: int, inputs: int, same: float) -> int:
    """The most of so many random rows that chance gives a twin, six standard deviations above: none of long rows."""
    pair = float(betainc((inputs - 1) / 2, 0.5, 1.0 - same**2))
    expected = rows * (1.0 - float((1.0 - pair) ** (rows - 1)))
    return int(expected + 6.0 * math.sqrt(expected))


def _evenly_spaced(biases: Array) -> bool:
    """Whether sorted values step evenly, as they are or on the scale of normal or Laplace quantiles."""
    ordered = np.sort(biases)
    count = len(ordered)
    from_mean = ordered - ordered.sum() / count
    spread = math.sqrt(float(from_mean @ from_mean) / count)
    if spread <= 1e-6 * max(1.0, -float(ordered[0]), float(ordered[-1])):
        return False  # All the same, as where a bias starts.
    middle = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    scales = np.empty((3, count))
    scales[0] = (ordered - middle) / spread
    scales[1] = ndtr(scales[0])
    # The distribution function of Laplace, with the same deviation.
    tail = 0.5 * np.exp(-math.sqrt(2.0) * np.abs(scales[0]))
    scales[2] = np.where(scales[0] < 0, tail, 1.0 - tail)
    gaps = scales[:, 1:] - scales[:, :-1]
    # Gaps are never negative and their sum is the whole way: the coefficient of variation of each scale's.
    means = (scales[:, -1] - scales[:, 0]) / (count - 1)
    squares = np.einsum("ij,ij->i", gaps, gaps) / (count - 1)
    return bool((np.maximum(squares - means**2, 0.0) < (_EVEN * means) ** 2).any())


def _fishing(tensors: Mapping[str, Array], learned_from_zero: Set[str]) -> Iterable[Finding]:
    last = next((name for name in reversed(list(tensors)) if tensors[name].ndim == 2), None)
    if last is None or last in learned_from_zero or tensors[last].shape[0] < 3:
        return
    rows = np.linalg.norm(tensors[last], axis=1)
    bias = tensors.get(last.removesuffix("weight") + "bias")
    middle = float(np.median(rows))
    if float(rows.max()) > _AMPLIFIED * middle and float(rows.max()) > 0:
        yield Finding(
            "fishing", last, f"its row {int(rows.argmax())} is amplified: the update would speak of one class"
        )
    if bias is not None and bias.shape == rows.shape:
        distance = np.abs(bias - np.median(bias))
        if float(distance.max()) > _AMPLIFIED * max(1.0, middle, float(np.median(distance))):
            yield Finding("fishing", last.removesuffix("weight") + "bias", "one class is held far from all others")
