"""Signs in a model's weights that it was built to make updates speak: what a site looks for before it trains.

A secure sum does not stop a malicious model: one that lets every image leave its own trace in the gradient keeps doing
so under masks. What gives such models away is in their weights. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import betainc

from wardround.wire.canonical import digest

Array = npt.NDArray[Any]

LARGEST_GAIN = 1e3
# Fewer rows or biases than these make no imprint worth having, and chance could line them up.
_ROWS, _BIASES = 8, 16
_SAME = 0.999  # cosine between rows
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


def lint_against(tensors: Mapping[str, Array], approved: Mapping[str, Array]) -> tuple[Finding, ...]:
    """What is suspicious about tensors, given `approved`, the initial ones of the network that a site agreed to.

    Compares the architecture, and looks for values that are not finite, gains above 1e3, layers that imprint (rows
    alike, or biases on the even quantiles of a distribution: Fowl et al., "Robbing the Fed", ICLR 2022) and output rows
    that single out a class (Wen et al., "Fishing for user data", ICML 2022). What the approved tensors show themselves
    is no news. Rows of a tensor that starts at zero are not compared: whatever it learns first is of low rank, and
    honest.
    """
    other = tuple(_architecture(tensors, approved))
    if other:
        return other
    zero = {name for name, tensor in approved.items() if not tensor.any()}
    found = lint_tensors(tensors, learned_from_zero=zero)
    if not found:
        return ()
    known = {(finding.check, finding.tensor) for finding in lint_tensors(approved)}
    return tuple(finding for finding in found if (finding.check, finding.tensor) not in known)


def lint_tensors(tensors: Mapping[str, Array], *, learned_from_zero: Set[str] = frozenset()) -> tuple[Finding, ...]:
    """The checks of `lint_against` that need nothing to compare with."""
    floats = {name: np.asarray(t, np.float64) for name, t in tensors.items() if np.issubdtype(t.dtype, np.floating)}
    found: list[Finding] = []
    whole: dict[str, Array] = {}
    for name, tensor in floats.items():
        if not np.isfinite(tensor).all():
            found.append(Finding("finite", name, "holds values that are not finite"))
            continue
        found += _gain(name, tensor, floats)
        whole[name] = tensor
        if tensor.ndim == 1 or name not in learned_from_zero:
            found += _imprint(name, tensor)
    return (*found, *_fishing(whole, learned_from_zero))


def _architecture(tensors: Mapping[str, Array], approved: Mapping[str, Array]) -> Iterable[Finding]:
    # Not every name of a foreign model is safe to repeat: only those of the approved one are.
    for name in sorted(approved):
        if name not in tensors:
            yield Finding("architecture", name, "is missing")
        elif tensors[name].shape != approved[name].shape or tensors[name].dtype != approved[name].dtype:
            yield Finding("architecture", name, "has another shape or type than in the study's network")
    for name in sorted(tensors.keys() - approved.keys()):
        yield Finding("architecture", name[:80], "is no tensor of the study's network")


def _gain(name: str, tensor: Array, tensors: Mapping[str, Array]) -> Iterable[Finding]:
    layer, _, kind = name.rpartition(".")
    if kind.startswith("running_") or not tensor.size:
        return
    gain = float(np.abs(tensor).max())
    variance = tensors.get(f"{layer}.running_var")
    if kind == "weight" and variance is not None and variance.shape == tensor.shape:
        gain = float((np.abs(tensor) / np.sqrt(np.maximum(variance, 0.0) + 1e-5)).max())
    if gain > LARGEST_GAIN:
        limit = f"{LARGEST_GAIN:g} is the most that is allowed (a training that diverged gets there, too)"
        yield Finding("gain", name, f"amplifies by {gain:.3g}; {limit}")


def _imprint(name: str, tensor: Array) -> Iterable[Finding]:
    if tensor.ndim >= 2 and tensor.shape[0] >= _ROWS and tensor[0].size >= 2:
        rows = tensor.reshape(tensor.shape[0], -1)
        lengths = np.linalg.norm(rows, axis=1)
        # Layers that start at zero are innocent: a row of zeros says nothing.
        rows = (rows[lengths > 0] / lengths[lengths > 0, None]).astype(np.float32)
        alike = _alike(rows)
        if len(rows) >= _ROWS and alike > 0.25 + _by_chance(*rows.shape):
            yield Finding("imprint", name, f"{alike:.0%} of its rows are alike: each one would measure the same thing")
    elif tensor.ndim == 1 and tensor.size >= _BIASES and name.endswith("bias") and _evenly_spaced(tensor):
        yield Finding("imprint", name, "its values lie evenly on a distribution: bins that sort inputs one by one")


def _alike(rows: Array) -> float:
    """The share of rows that have a twin."""
    if len(rows) < 2:
        return 0.0
    twins = 0
    for start in range(0, len(rows), 512):
        cosines = np.abs(rows[start : start + 512] @ rows.T)
        cosines[np.arange(len(cosines)), start + np.arange(len(cosines))] = 0.0
        twins += int((cosines.max(axis=1) > _SAME).sum())
    return twins / len(rows)


def _by_chance(rows: int, inputs: int) -> float:
    """The share of so many random rows that would have a twin: most of them where a row has two or three values."""
    pair = float(betainc((inputs - 1) / 2, 0.5, 1.0 - _SAME**2))
    return 1.0 - float((1.0 - pair) ** (rows - 1))


def _evenly_spaced(biases: Array) -> bool:
    """Whether sorted values step evenly, as they are or on the scale of normal or Laplace quantiles."""
    spread = float(biases.std())
    if spread <= 1e-6 * max(1.0, float(np.abs(biases).max())):
        return False  # All the same, as where a bias starts.
    ordered = (np.sort(biases) - np.median(biases)) / spread
    laplace = ordered * math.sqrt(2.0)
    scales = (
        ordered,
        np.array([0.5 * math.erfc(-x / math.sqrt(2.0)) for x in ordered]),
        np.where(laplace < 0, 0.5 * np.exp(np.minimum(laplace, 0)), 1 - 0.5 * np.exp(-np.maximum(laplace, 0))),
    )
    return any(_variation(np.diff(scale)) < _EVEN for scale in scales)


def _variation(gaps: Array) -> float:
    mean = float(gaps.mean())
    return float(gaps.std()) / mean if mean > 0 else math.inf


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
