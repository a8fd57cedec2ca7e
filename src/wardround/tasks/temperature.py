"""Temperature scaling: one number by which a site divides a model's logits, so that its probabilities come true.

Guo et al., On calibration of modern neural networks (ICML 2017). The site fits it to its own validation patients, and
keeps it beside its part of the model; no message holds it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
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


def probabilities(logits: Floats, temperature: float, *, multi_label: bool) -> Floats:
    """Of each image: logits (n, K) -> (n, K)."""
    scaled = logits / temperature
    return np.asarray(expit(scaled) if multi_label else softmax(scaled, axis=1))


def fitted(logits: Sequence[Floats], labels: Floats, *, multi_label: bool) -> float | None:
    """The temperature under which the patients' classes are likeliest.

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
        found = probabilities(every, math.exp(exponent), multi_label=multi_label)
        means = np.clip(np.add.reduceat(found, starts) / counts[:, None], _LEAST_PROBABILITY, 1.0)
        likely = labels * np.log(means)
        if multi_label:
            likely += (1.0 - labels) * np.log(np.clip(1.0 - means, _LEAST_PROBABILITY, 1.0))
        return float(-likely.sum())

    found = minimize_scalar(unlikely, bounds=(math.log(LOWEST), math.log(HIGHEST)), method="bounded")
    return float(math.exp(found.x))


def keep_temperature(folder: Path, temperature: float | None) -> None:
    """Write the site's temperature of a model beside the site's part of it, or take away that of another model."""
    path = folder / _FILE
    if temperature is None:
        path.unlink(missing_ok=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"temperature": temperature}) + "\n")


def kept_temperature(folder: Path) -> float | None:
    """The temperature that a site keeps beside its part of a model; None where there is no readable one."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = float(json.loads((folder / _FILE).read_text(encoding="utf-8"))["temperature"])
        return found if LOWEST <= found <= HIGHEST else None
    return None
