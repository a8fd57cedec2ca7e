"""What is allowed in a study and its sites file, and is seldom meant."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from wardround.errors import DataError
from wardround.plan.weights import load_model, place_of, study_of
from wardround.study.places import Places
from wardround.study.registry import BASELINES, baseline
from wardround.study.schema import Study
from wardround.study.sites import SitesFile
from wardround.study.start import FromRelease


def remarks_on_given(study: Study, places: Places) -> Iterator[str]:
    """Where a study that trains nothing may test a released model on patients who trained it: for `check` and report.

    A release says which study made it. Sites are told by their names, so of a weights file nothing is known.
    """
    if study.trains or not isinstance(study.start, FromRelease):
        return
    path = place_of(study.start, places)
    try:
        before = study_of(path, load_model(path)[1])
    except DataError:
        # Of a version whose studies are not read any more: its values are.
        return
    alike = before.seed == study.seed and getattr(before.task, "split", None) == getattr(study.task, "split", None)
    trained = [name for name in before.training_sites if name in study.sites and not study.sites[name].scans]
    if otherwise := [name for name in trained if not alike or study.sites[name].role != "train"]:
        yield (
            f"the given model trained at {', '.join(otherwise)}, and this study deals those patients out otherwise: "
            "some who trained it may test it, which flatters the numbers; give this study the seed and the `split` of "
            "that one, and these sites `role: train`"
        )


def remarks_on_missing(study: Study) -> Iterator[str]:
    """Which site lacks which contrasts: for `check` and the report."""
    lacking = {name: site.missing for name, site in study.sites.items() if site.missing}
    for name, missing in lacking.items():
        has = [contrast for contrast in study.task.may_lack if contrast not in missing]
        yield f"{name} has no {' and no '.join(missing)}: there the network sees {', '.join(has)} alone"


def remarks_on_baselines(study: Study) -> Iterator[str]:
    """Whether a network that takes images for real is compared with methods alone that do not: for `check`."""
    if not study.scans or not study.model.real_images or "tv" not in study.baselines:
        return
    known = {name: baseline(name) for name in BASELINES}
    fair = [name for name, found in known.items() if found.real_images and found.serves(study.modality)]
    if fair and not set(fair) & set(study.baselines):
        yield (
            "the network takes images for real (model.image: real) and `tv` does not, so a gain over it is in part the "
            f"assumption's; add {fair[0]} to task.evaluation.baselines (docs/baselines.md)"
        )


def remarks_on(study: Study, sites: SitesFile) -> Iterator[str]:
    """Sentences for `check` and the start of a run; they name sites, never folders."""
    yield from remarks_on_missing(study)
    if any(site.missing for site in study.sites.values()) and not getattr(study.task, "drop_contrasts", 0.0):
        yield (
            "sites that have all contrasts never train without one (task.drop_contrasts is 0), so what they learn may "
            "not serve the sites that lack one; set it, to 0.3 say"
        )
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
