"""What `check` and a hospital's review say of the statistics of images that a study asks sites for."""

from __future__ import annotations

from wardround.runs.machine import Machine
from wardround.site.statistics import kinds_of
from wardround.tasks.looks import subject_of

_WORDS = {
    "intensity": "histograms",
    "landmarks": "their percentiles on one scale",
    "spectrum": "spectra",
    "noise": "noise",
    "matrix": "numbers of voxels",
    "spacing": "voxel sizes",
    "masks": "shares, slices and volumes of what is drawn",
    "classes": "numbers of patients by class",
}


def statistics_words(host: Machine, site: str | None = None) -> str | None:
    """What leaves before round 1 because of `site_statistics`; `None` for a study that asks for nothing."""
    if not host.study.site_statistics:
        return None
    kinds = list(kinds_of(subject_of(host.task)))
    rules = None if site is None else host.egress(site)
    if rules is not None:
        if not rules.per_site_results:
            return "no statistics of images: egress.per_site_results is false"
        listed = rules.metrics
        kinds = [kind for kind in kinds if listed is None or kind in listed]
        kinds = [kind for kind in kinds if rules.scanner_facts or kind not in ("matrix", "spacing")]
    what = ", ".join(_WORDS[kind] for kind in kinds) or "nothing"
    least = "egress.minimum_cohort" if rules is None else str(rules.least)
    masked = "; not masked" if host.study.protection.secure else ""
    return (
        "statistics of images (site_statistics): sums over the training patients, or where none trains those who test, "
        f"of {what}; of no part of the patients below {least}{masked}"
    )
