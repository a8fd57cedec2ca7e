"""What is left in a model of a hospital that left: a membership attack on its own patients, before and after.

The attacker has the model, and asks of each patient of the hospital whether the loss is low enough that the patient
trained (Yeom et al., CSF 2018). Its area under the ROC is 0.5 where it can only guess. What counts is not 0.5 but what
the same attack finds on a model that the hospital never trained: its training patients may be easier or harder than
its others for any model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from wardround.errors import DataError
from wardround.learning.device import Placed
from wardround.runs.machine import NOWHERE, Machine
from wardround.runs.releases import ReleasedModel
from wardround.runs.session import open_host
from wardround.study.base import Config
from wardround.study.schema import Study
from wardround.study.sites import SitesFile
from wardround.wire.random import public_generator

Floats = npt.NDArray[np.float64]
DRAWS = 2000


class Attacked(Config):
    """The area under the ROC of the attack on a model, with a 95 % interval over the hospital's patients."""

    auroc: float
    low: float
    high: float


class Gap(Config):
    """How far two models' attacks are apart on the same patients; `high` is the upper 95 % bound of the distance."""

    gap: float
    high: float


class Remains(Config):
    """What the attack finds; of each model beside `retrained`, how far it is from that, where there is one."""

    site: str
    members: int
    outsiders: int
    models: dict[str, Attacked]
    to_retrained: dict[str, Gap]

    def lines(self) -> list[str]:
        """For people."""
        said = [
            f"Membership attack at {self.site}: {self.members} patients who trained, {self.outsiders} who did not "
            "(0.5 is guessing)"
        ]
        said += [f"  {name}: {one.auroc:.3f} ({one.low:.3f} to {one.high:.3f})" for name, one in self.models.items()]
        said += [
            f"  {name} and a model that {self.site} never trained: {one.gap:.3f} apart, at most {one.high:.3f}"
            for name, one in self.to_retrained.items()
        ]
        if not self.to_retrained:
            said.append("  How much of that is left of the hospital is known only beside a model retrained without it.")
        return said


@dataclass(frozen=True)
class Losses:
    """Mean losses of a hospital's patients by a model: who trained (n,), and who did not (m,)."""

    members: Floats
    outsiders: Floats

    @property
    def attack(self) -> float:
        """The chance that a member's loss is lower than an outsider's."""
        return _lower(self.members, self.outsiders)

    def drawn(self, members: npt.NDArray[np.int64], outsiders: npt.NDArray[np.int64]) -> float:
        """The same of patients drawn anew."""
        return _lower(self.members[members], self.outsiders[outsiders])


def _lower(members: Floats, outsiders: Floats) -> float:
    """`membership.auc` of losses, by sorting: thousands of samples of hundreds of patients are drawn."""
    ordered = np.sort(outsiders)
    above = len(ordered) - 0.5 * (np.searchsorted(ordered, members) + np.searchsorted(ordered, members, "right"))
    return float(above.mean() / len(ordered))


RETRAINED = "retrained"


def compare(site: str, models: Mapping[str, Losses], seed: int = 0, draws: int = DRAWS) -> Remains:
    """The attack on several models, by the same patients; `RETRAINED` is the one that the others are compared with.

    Intervals are percentiles of `draws` bootstrap samples, of members and of outsiders apart, the same for all models,
    so that what is alike in them does not blur their distance. 95 % of the samples' distances lie below a gap's bound.
    """
    first = next(iter(models.values()))
    random = public_generator(seed, "remains")
    samples = [
        (random.integers(0, n := len(first.members), n), random.integers(0, m := len(first.outsiders), m))
        for _ in range(draws)
    ]
    found = {name: np.array([losses.drawn(*one) for one in samples]) for name, losses in models.items()}
    gaps = {}
    for name in models if RETRAINED in models else ():
        if name != RETRAINED:
            gap = abs(models[name].attack - models[RETRAINED].attack)
            gaps[name] = Gap(gap=gap, high=float(np.percentile(np.abs(found[name] - found[RETRAINED]), 95.0)))
    attacked = {}
    for name, losses in models.items():
        low, high = map(float, np.percentile(found[name], (2.5, 97.5)))
        attacked[name] = Attacked(auroc=losses.attack, low=low, high=high)
    return Remains(
        site=site,
        members=len(first.members),
        outsiders=len(first.outsiders),
        models=attacked,
        to_retrained=gaps,
    )


def remains(study: Study, sites: SitesFile, site: str, models: Mapping[str, Path], near: Path) -> Remains:
    """The attack on released models, with a hospital's own patients as a study deals them. Nothing leaves the hospital.

    `study` is one in which the hospital trained, `models` files by name. Raises `StudyError` and `DataError` where the
    study, the data or a model cannot be read, and where no patient of the hospital trained, or all of them did.
    """
    host = open_host(study, sites, NOWHERE, (), (), None, near=near)
    return compare(site, {name: losses_of(host, site, path) for name, path in models.items()}, study.seed)


def losses_of(host: Machine, site: str, model: Path) -> Losses:
    """The mean loss of each of a site's patients by a released model."""
    dataset, compute = host.dataset(site), host.agent(site).held.compute
    if not dataset.patients("train") or not dataset.patients("validation") + dataset.patients("test"):
        raise DataError(f"site {site}: the attack needs patients who trained and patients who did not")
    network = ReleasedModel.opened(model).network(host.task.build_model, None, None)
    placed = Placed(host.task, compute)

    @torch.no_grad()
    def means(*splits: str) -> Floats:
        found: dict[tuple[str, int], list[float]] = {}
        for split in splits:
            for patient, batch in dataset.evaluation(split):  # type: ignore[arg-type]
                found.setdefault((split, patient), []).append(float(placed.loss(network, batch)))
        return np.array([float(np.mean(values)) for values in found.values()])

    return Losses(means("train"), means("validation", "test"))
