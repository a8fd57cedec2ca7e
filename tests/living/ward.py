"""A task that trains in milliseconds and has patients with names: what living models are tested with.

A site's folder has a file `patients.txt`, a name a line. A patient's points follow from the name, and the site's from
its name and the file's `shift`, so a patient is the same in every run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.toys import Points, Regression, toy_study
from wardround.imaging.datasets.split import Deal, by_seed
from wardround.study.schema import Study
from wardround.study.sites import SiteData, SitesFile
from wardround.study.tasks import Split as Shares
from wardround.tasks.task import Source, Split
from wardround.wire.random import public_generator

SHARES = Shares(validation=0.2, test=0.4)
LISTED, SHIFT = "patients.txt", "shift.txt"


@dataclass(frozen=True)
class NamedPoints(Points):
    """Points whose patients have names."""

    who: tuple[str, ...] = ()

    def names(self, split: Split) -> tuple[str, ...]:
        """The names of a split's patients, in the order of `evaluation`."""
        return tuple(self.who[number] for number in self.splits[split])


class Ward(Regression):
    """The regression of `tests.toys` on patients with names, dealt out as the site says."""

    _deal: Deal

    def deal_by(self, deal: Deal) -> None:
        """As `wardround.tasks.task.Dealing`."""
        object.__setattr__(self, "_deal", deal)

    def dataset(self, site: str, source: Source) -> NamedPoints:
        """The patients in the site's list."""
        who = tuple(sorted((source[0] / LISTED).read_text().split()))
        shift = float((source[0] / SHIFT).read_text())
        x = np.concatenate([public_generator(5, name).standard_normal((2, self.features)) for name in who])
        points = torch.from_numpy(x.astype(np.float32))
        y = torch.tanh(points.sum(dim=1, keepdim=True) * 0.5 + shift)
        deal = getattr(self, "_deal", by_seed)
        parts = deal(site, who, SHARES, 3, ROLES.get(site, "train"))
        return NamedPoints(points, y, {part: list(numbers) for part, numbers in parts.items()}, site, who)


# A custom task is not told the roles of its sites: tests say them here.
ROLES: dict[str, Any] = {}


def make_ward(**options: Any) -> Ward:
    """The factory that studies of the ward name."""
    return Ward(**options)


def ward_study(sites: Sequence[str] | Mapping[str, Any] = ("A", "B"), **changes: Any) -> Study:
    """A study of the ward; the rest is as in `toy_study`."""
    task = {"kind": "custom", "factory": "tests.living.ward:make_ward", "options": changes.pop("options", {})}
    return toy_study(sites, **{"task": task, "schedule": {"rounds": 2}, **changes})


def admit(folder: Path, names: Iterable[str], shift: float = 0.0) -> None:
    """Add patients to a site's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    known = (folder / LISTED).read_text().split() if (folder / LISTED).exists() else []
    (folder / LISTED).write_text("\n".join(dict.fromkeys([*known, *names])))
    (folder / SHIFT).write_text(str(shift))


def ward_sites(root: Path, sites: Mapping[str, int], history: bool = True) -> SitesFile:
    """Sites with so many patients each, with a history folder of their own."""
    for number, (site, count) in enumerate(sites.items()):
        admit(root / site, [f"{site}-DOE-{patient:02d}" for patient in range(count)], 0.3 * number)
    return SitesFile(
        sites={
            site: SiteData(data=root / site, **({"history": root / f"history-{site}"} if history else {}))
            for site in sites
        }
    ).with_code()
