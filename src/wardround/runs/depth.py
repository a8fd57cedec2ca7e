"""Whether a network is out of its depth: how well its images explain what was measured, beside total variation.

After the last data consistency of a network, |A x - y| / |y| says how much of the data its image x leaves unexplained.
By itself that depends on the noise and on the anatomy, so it is compared twice: with that of total variation on the
same data, and with the same two on a scan simulated as in training. What is scanned there is total variation's own
image of the input. Nothing but the released model and its study is needed, and nothing of a patient's is kept with it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from wardround.imaging.acquisition.operator import LinearOperator
from wardround.study.registry import baseline
from wardround.study.schema import Study

# An operator and the data (1, *data_shape) of one slice; made when asked for, for a volume has many.
Scan = Callable[[], tuple[LinearOperator, Tensor]]
Classical = Callable[[LinearOperator, Tensor], Tensor]
Score = Callable[[int, Tensor], Mapping[str, float]]
CHECKED = 8  # slices of a volume that are looked at, evenly spread
_REPEATED = 3  # of them, scanned again as in training
_SIGNAL = 0.1  # of the strongest slice: air has no residual worth the name
# Times the ratio of scans simulated as in training. Measured with a network for four MRI sites: at most 1.15 on
# simulated scans of nine patients, 1.75 on k-space of a real scanner, where its image shows folds.
LIMIT = 1.4
_WORSE = 0.1  # dB below total variation, where a reference is there to say so


@dataclass(frozen=True)
class Residuals:
    """|A x - y| / |y| of the network and of total variation, slice by slice."""

    network: tuple[float, ...]
    classical: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """How many times more the network leaves unexplained: the median over slices."""
        pairs = zip(self.network, self.classical, strict=True)
        return statistics.median(ours / max(theirs, 1e-12) for ours, theirs in pairs)


@dataclass(frozen=True)
class Depth:
    """What was found; `expected` is that of scans simulated as in training, `scores` the means where a reference is."""

    slices: int
    measured: Residuals
    expected: Residuals | None = None
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def fires(self) -> bool:
        """Whether the network is out of its depth."""
        return self.measured.ratio > self.limit

    @property
    def limit(self) -> float:
        """How many times as much as total variation the network may leave unexplained."""
        return LIMIT * (1.0 if self.expected is None else max(1.0, self.expected.ratio))

    @property
    def _behind(self) -> float:
        """PSNR of total variation less that of the network, in dB; 0 without a reference."""
        psnr = {name: values["psnr"] for name, values in self.scores.items() if "psnr" in values}
        return psnr["tv"] - psnr["network"] if len(psnr) == 2 else 0.0

    def lines(self) -> list[str]:
        """What is printed of it."""
        count = len(self.measured.network)
        said = [
            f"Unexplained by the image, |Ax - y| / |y|, on {count} of {self.slices} slices (median): "
            f"{_pair(self.measured)}"
        ]
        if self.expected is not None:
            said[0] += f"; of the same anatomy, scanned as in training: {_pair(self.expected)}"
        said[0] += "."
        if not self.fires:
            times = f"{self.measured.ratio:.2g} times as much as total variation"
            said[0] += f" The network leaves {times}, which is usual; there is a warning above {self.limit:.2g}."
        if self.scores:
            each = "; ".join(f"{name} {_scores(values)}" for name, values in self.scores.items())
            said.append(f"Against the input, on the same slices: {each}.")
        if self._behind > _WORSE:
            said.append(f"Mind: total variation, which learns nothing, is {self._behind:.1f} dB nearer to the input.")
        if self.fires:
            said.append(
                f"WARNING: the network is out of its depth here: its image leaves {self.measured.ratio:.1f} times as "
                "much unexplained as total variation's. Do not trust it; --fallback tv writes total variation's."
            )
        return said


def chosen(network: Classical, classical: Classical, depth: Depth | None, fallback: bool) -> Classical:
    """What writes the images: the network, or with `fallback`, where that is out of its depth, the classical method."""
    return classical if fallback and depth is not None and depth.fires else network


def look(
    network: nn.Module,
    scans: Sequence[Scan],
    classical: Classical,
    again: Callable[[int, Tensor], tuple[LinearOperator, Tensor] | None],
    score: Score | None = None,
    *,
    most: int = CHECKED,
    usual: nn.Module | None = None,
) -> Depth | None:
    """Compare a network with total variation on at most `most` slices of a volume; None where no slice holds a signal.

    `again(n, image)` scans total variation's image (1, H, W) of slice n as in training, or says that it cannot.
    `score(n, image)` gives metrics against a reference. `usual` is the network of which scans simulated as in training
    say what is usual, where that is another: the released one of a network that was adapted to these scans.
    """
    numbers = spread(scans, most)
    if not numbers:
        return None
    found: dict[str, list[float]] = {"network": [], "tv": []}
    repeated: dict[str, list[float]] = {"network": [], "tv": []}
    scores: dict[str, list[Mapping[str, float]]] = {"network": [], "tv": []}
    twice = {numbers[i] for i in np.linspace(0, len(numbers) - 1, min(_REPEATED, len(numbers))).astype(int)}
    with torch.no_grad():
        for number in numbers:
            operator, data = scans[number]()
            images = {"network": network(operator, data), "tv": classical(operator, data)}
            for name, image in images.items():
                found[name].append(residual(operator, image, data))
                if score is not None:
                    scores[name].append(score(number, image))
            rescanned = again(number, images["tv"]) if number in twice else None
            if rescanned is not None:
                repeated["network"].append(residual(*_with(usual or network, rescanned)))
                repeated["tv"].append(residual(*_with(classical, rescanned)))
    return Depth(
        len(scans),
        Residuals(tuple(found["network"]), tuple(found["tv"])),
        Residuals(tuple(repeated["network"]), tuple(repeated["tv"])) if repeated["tv"] else None,
        {} if score is None else {name: _means(values) for name, values in scores.items()},
    )


def total_variation(study: Study) -> Classical:
    """Total variation with the middle weight of the study, which no patient chose."""
    assert study.task.classical is not None
    weights = baseline("tv").parameters(study.task.classical, study.modality)
    weight = weights[len(weights) // 2]
    return lambda operator, data: cast(Tensor, baseline("tv").reconstruct(operator, data, weight))


def residual(operator: LinearOperator, image: Tensor, data: Tensor) -> float:
    """|A x - y| / |y| of one slice (1, H, W)."""
    x = image.to(data.dtype) if data.is_complex() else image
    return float((operator.A(x) - data).abs().norm() / data.abs().norm().clamp_min(1e-12))


def _with(method: Classical | nn.Module, scan: tuple[LinearOperator, Tensor]) -> tuple[LinearOperator, Tensor, Tensor]:
    return scan[0], method(*scan), scan[1]


def spread(scans: Sequence[Scan], most: int) -> list[int]:
    """Slices with a signal, evenly spread over twice as many candidates."""
    candidates = sorted({int(n) for n in np.linspace(0, len(scans) - 1, min(2 * most, len(scans)))})
    norms = {number: float(scans[number]()[1].abs().norm()) for number in candidates}
    strongest = max(norms.values(), default=0.0)
    kept = [number for number, norm in norms.items() if norm > _SIGNAL * strongest]
    return [kept[i] for i in sorted({int(i) for i in np.linspace(0, len(kept) - 1, min(most, len(kept)))})]


def _means(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(each[name] for each in values) for name in values[0]}


def _pair(residuals: Residuals) -> str:
    ours, theirs = statistics.median(residuals.network), statistics.median(residuals.classical)
    return f"network {ours:.3f}, total variation {theirs:.3f}"


def _scores(values: Mapping[str, float]) -> str:
    return ", ".join(
        f"{name} {value:.2f} dB" if name == "psnr" else f"{name} {value:.4f}" for name, value in values.items()
    )
