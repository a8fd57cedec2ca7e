"""What a site makes a model's logits come true with: a temperature, and the classes' shares that training took out.

One number by which logits are divided (Guo et al., On calibration of modern neural networks, ICML 2017), fitted to the
site's own validation patients. Where `task.imbalance` lets a model learn as if all classes were equally frequent, the
log of each one's share at the site is added back (Menon et al., Long-tail learning via logit adjustment, ICLR 2021).
The site keeps both beside its part of the model; no message holds them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.special import expit, softmax

from wardround.wire.files import write_text

Floats = npt.NDArray[np.float64]
# Fewer validation patients make no temperature.
LEAST = 10
# Within these: patients who are all called right would make a model that is never in doubt.
LOWEST, HIGHEST = 0.25, 10.0
_FILE = "temperature.json"
_LEAST_PROBABILITY = 1e-12


@dataclass(frozen=True)
class Calibration:
    """A site's own: probabilities are those of logits / temperature + offsets, one a class (empty: none)."""

    temperature: float
    offsets: tuple[float, ...] = ()


def probabilities(logits: Floats, temperature: float, offsets: Sequence[float] = (), *, multi_label: bool) -> Floats:
    """Of each image: logits (n, K) -> (n, K)."""
    scaled = logits / temperature + (np.asarray(offsets) if len(offsets) else 0.0)
    return np.asarray(expit(scaled) if multi_label else softmax(scaled, axis=1))


def fitted(
    logits: Sequence[Floats], labels: Floats, offsets: Sequence[float] = (), *, multi_label: bool
) -> Calibration | None:
    """The temperature under which, with the offsets, the patients' classes are likeliest.

    logits: of each patient (images, K); a patient has the mean probabilities of all images. labels: (patients, K), 1
    or 0. None for fewer than `LEAST` patients, and where a logit is not a number.
    """
    if len(logits) < LEAST or not all(np.isfinite(each).all() for each in logits):
        return None
    # Late: every process of a site imports this file, and few fit a temperature.
    from scipy.optimize import minimize_scalar

    every, counts = np.concatenate(logits), np.array([len(each) for each in logits])
    starts = np.cumsum(counts) - counts

    def unlikely(exponent: float) -> float:
        found = probabilities(every, math.exp(exponent), offsets, multi_label=multi_label)
        means = np.clip(np.add.reduceat(found, starts) / counts[:, None], _LEAST_PROBABILITY, 1.0)
        likely = labels * np.log(means)
        if multi_label:
            likely += (1.0 - labels) * np.log(np.clip(1.0 - means, _LEAST_PROBABILITY, 1.0))
        return float(-likely.sum())

    found = minimize_scalar(unlikely, bounds=(math.log(LOWEST), math.log(HIGHEST)), method="bounded")
    return Calibration(float(math.exp(found.x)), tuple(map(float, offsets)))


def keep_calibration(folder: Path, calibration: Calibration | None) -> None:
    """Write the site's calibration of a model beside the site's part of it, or take away that of another model."""
    path = folder / _FILE
    if calibration is None:
        path.unlink(missing_ok=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"temperature": calibration.temperature, "offsets": calibration.offsets}
        write_text(path, json.dumps(kept) + "\n")


def kept_calibration(folder: Path) -> Calibration | None:
    """The calibration that a site keeps beside its part of a model; None where there is no readable one."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        found = Calibration(float(kept["temperature"]), tuple(map(float, kept.get("offsets", ()))))
        known = LOWEST <= found.temperature <= HIGHEST and all(map(math.isfinite, found.offsets))
        return found if known else None
    return None
