"""What is allowed in a study and its sites file, and is seldom meant."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from wardround.study.schema import Study
from wardround.study.sites import SitesFile


def remarks_on(study: Study, sites: SitesFile) -> Iterator[str]:
    """Sentences for `check` and the start of a run; they name sites, never folders."""
    if len(study.training_sites) == 1:
        yield (
            f"{study.training_sites[0]} is the only site that trains: this is a federation of one, and its model is "
            "that of the site alone"
        )
    named = [name for name in study.sites if name in sites.sites and not study.sites[name].scans]
    for one, other in combinations(named, 2):
        first, second = sites.of(one).data, sites.of(other).data
        if set(first) & set(second):
            how = "have a data folder in common"
        elif any(a.is_relative_to(b) or b.is_relative_to(a) for a in first for b in second):
            how = "have data folders of which one lies in the other"
        else:
            continue
        yield (
            f"{one} and {other} {how}: the same patients may train at one and test at the other, which flatters every "
            "number; correct the sites file unless this is meant"
        )
