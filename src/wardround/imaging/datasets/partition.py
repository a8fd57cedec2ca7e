"""Ways to part patients who belong to no hospital among sites, for studies of data that came without any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np

from wardround.errors import StudyError
from wardround.wire.random import public_generator

How: TypeAlias = Literal["even", "quantity", "labels"]
Shares: TypeAlias = dict[str, tuple[str, ...]]
_DRAWS = 1000


def part(
    patients: Sequence[str],
    sites: Sequence[str],
    how: How,
    *,
    seed: int,
    alpha: float = 0.5,
    least: int = 3,
    labels: Mapping[str, str] | None = None,
) -> Shares:
    """The patients of each site, in the order of their names; every patient is at one site.

    `even` gives all sites as many patients, to within one. `quantity` draws the sites' shares of all patients, and
    `labels` those of the patients of each label, from a symmetric Dirichlet distribution of concentration `alpha` (Hsu
    et al., arXiv 1909.06335): the smaller, the less alike are the sites. What is drawn depends on the seed, the sites'
    names and the number of patients (of each label) alone; it is drawn anew until each site has `least` patients.
    Raises StudyError where that cannot be, or where a patient has no label.
    """
    if least < 1 or len(patients) < least * len(sites):
        raise StudyError(
            f"{len(patients)} patients cannot be parted among {len(sites)} sites of at least {max(least, 1)}"
        )
    if not alpha > 0.0:
        raise StudyError("alpha: must be positive; 0.1 makes the sites unlike, 100 alike")
    names = sorted(patients)
    groups = _by_label(names, labels or {}) if how == "labels" else {"": names}
    for draw in range(_DRAWS):
        found: dict[str, list[str]] = {site: [] for site in sites}
        for label, group in groups.items():
            random = public_generator(seed, "partition", *sites, label, len(group), draw)
            shuffled = [group[i] for i in random.permutation(len(group))]
            even = np.full(len(sites), 1.0 / len(sites))
            share = even if how == "even" else random.dirichlet(np.full(len(sites), alpha))
            for site, some in zip(sites, np.split(np.array(shuffled, object), _cuts(share, len(group))), strict=True):
                found[site] += some.tolist()
        if all(len(own) >= least for own in found.values()):
            return {site: tuple(sorted(own)) for site, own in found.items()}
    raise StudyError(
        f"in {_DRAWS} draws with alpha {alpha:g} some site had fewer than {least} patients each time; take a larger "
        "alpha, fewer sites or a smaller least number"
    )


def by_value(values: Mapping[str, str]) -> Shares:
    """A site for each value that patients have, in the order of values; the names of sites are the values."""
    found: dict[str, list[str]] = {}
    for patient, value in sorted(values.items()):
        found.setdefault(value, []).append(patient)
    return {value: tuple(own) for value, own in sorted(found.items())}


def _cuts(share: np.ndarray, count: int) -> list[int]:
    """Where a list of `count` is cut, so that each piece is its share of it to within one."""
    return [int(cut) for cut in np.round(np.cumsum(share)[:-1] * count)]


def _by_label(names: Sequence[str], labels: Mapping[str, str]) -> dict[str, list[str]]:
    without = sum(name not in labels for name in names)
    if without:
        raise StudyError(f"{without} of {len(names)} patients have no label in the table; complete it")
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(labels[name], []).append(name)
    return dict(sorted(found.items()))
