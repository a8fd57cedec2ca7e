"""What `wardround site drift` does: a release's own patients at a site against those who came since."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wardround.errors import DataError, StudyError
from wardround.federation.release import shared_sha256
from wardround.imaging.datasets.split import Parts, Role
from wardround.runs.releases import ReleasedModel
from wardround.site.datasets import history_of, patients_of
from wardround.site.drift import LEAST, Moved, Reference, compare, look
from wardround.site.lineage import Lineage
from wardround.storage.cipher import StoreCipher
from wardround.study.sites import SitesFile, load_sites
from wardround.study.tasks import Split
from wardround.tasks.build import build_task
from wardround.tasks.task import Dealing, MetricSpec
from wardround.wire.files import write_text


@dataclass(frozen=True)
class Drift:
    """What a site sees of a release: each measure, and whether the site should ask for an update.

    `recorded` is whether the release's own patients are on record from an earlier call, and not measured now.
    """

    site: str
    release: str
    moved: tuple[Moved, ...]
    recorded: bool
    metrics: tuple[MetricSpec, ...] = ()

    @property
    def drifted(self) -> tuple[str, ...]:
        """The measures that moved by more than chance."""
        return tuple(moved.measure for moved in self.moved if moved.drifted)

    def to_json(self) -> dict[str, Any]:
        """For a file at the site."""
        return {
            "site": self.site,
            "release": self.release,
            "drifted": list(self.drifted),
            "measures": [moved.to_json() for moved in self.moved],
        }


def drift(
    release: str | Path,
    site: str,
    sites: SitesFile | str | Path,
    *,
    plugins: Collection[str] = (),
    again: bool = False,
    out: str | Path | None = None,
) -> Drift:
    """Compare a site's recent images with those on whom a released model was validated and tested there.

    `release` is the model's file or its run's folder. Recent are the site's patients who were in neither the release
    nor one before it, by the site's own record. The first call puts on record what the release's own patients gave, in
    the site's history folder, so that a later one needs their images no more; `again` makes that record anew. Where
    `out` is given, the numbers are written there as JSON. Nothing leaves the site.

    Raises `StudyError` for a release that was not made with this site or whose task cannot tell patients apart, and
    `DataError` where the site has no record of the release, or no patient came since.
    """
    path = Path(release) / "models" / "federated.safetensors" if Path(release).is_dir() else Path(release)
    opened = ReleasedModel.opened(path, plugins)
    given = sites if isinstance(sites, SitesFile) else load_sites(sites)
    entry, sha256 = given.of(site), shared_sha256(path)
    history = history_of(given, None if entry.history else _run_of(path), site)
    if history is None:
        raise DataError(
            f"site {site} keeps no history, so that nobody knows which patients the release had; set "
            f"sites.{site}.history in the sites file, or give the folder of the release's run"
        )
    kept = Reference(history, StoreCipher.of(given.key(site)))
    before = None if again else kept.of(sha256)
    task = build_task(opened.study, plugins=opened.plugins)
    parts = _Parts(
        site, Lineage(history), sha256, None if entry.patients is None else patients_of(entry.patients, site)
    )
    if not isinstance(task, Dealing):
        raise StudyError(
            f"task.kind {opened.study.task.kind} parts its patients by itself, so old and new stay unknown"
        )
    network = opened.network(task.build_model, site, None)
    task.deal_by(parts.deal)
    dataset = task.dataset(site, entry.data)
    if before is None:
        if not parts.own:
            raise DataError(
                f"no patient whom site {site} has now validated or tested the release by its record; restore them, or "
                "its history folder"
            )
        own = look(task, network, dataset, "validation")
        kept.keep(sha256, own)
    else:
        own = before
    if parts.recent < LEAST:
        raise DataError(
            f"{parts.recent} patients of site {site} came since the release, and a test needs {LEAST}; wait for more"
        )
    recent = look(task, network, dataset, "test", own.edges)
    found = Drift(site, sha256, compare(own, recent, task.metrics), before is not None, task.metrics)
    if out is not None:
        write_text(Path(out), json.dumps(found.to_json(), indent=2) + "\n")
    return found


@dataclass
class _Parts:
    """Deals a site's patients out: those who validated or tested the release, and those who came since.

    Who trained it is in neither part: a network is surer of them than of anybody else.
    """

    site: str
    lineage: Lineage
    release: str
    listed: frozenset[str] | None
    own: int = 0
    recent: int = 0

    def deal(self, site: str, names: Sequence[str], split: Split, seed: int, role: Role) -> Parts:
        """A `Deal`: the release's own patients validate, those who came since test."""
        if not self.lineage.knows(self.release):
            raise DataError(
                f"site {self.site} has no record of this release: it was not delivered here. Give the one that was"
            )
        known = self.lineage.parts(self.release, names)
        mine = [n for n, name in enumerate(names) if self.listed is None or name in self.listed]
        own = tuple(n for n in mine if known.get(names[n]) in ("validation", "test"))
        recent = tuple(n for n in mine if names[n] not in known)
        self.own, self.recent = len(own), len(recent)
        return {"train": (), "validation": own, "test": recent}


def _run_of(model: Path) -> Path | None:
    """The folder of the run that a model lies in."""
    folder = model.absolute().parent.parent
    return folder if (folder / "work").is_dir() else None


# What is printed -----------------------------------------------------------------------------------------------------

_LABELS = {
    "intensity": "intensities (distance of histograms)",
    "spectrum": "spectrum (distance, log10)",
    "noise": "noise",
    "confidence": "confidence (largest probability)",
    "entropy": "entropy of what it says (nats)",
    "calibration": "calibration error",
}


def rows_of(found: Drift) -> list[tuple[str, ...]]:
    """The cells of the table, measure by measure: label, before, now, p, patients, verdict."""
    labels = {spec.name: spec.label or spec.name for spec in found.metrics}
    rows: list[tuple[str, ...]] = []
    for moved in found.moved:
        label = labels.get(moved.measure) or _LABELS.get(moved.measure, moved.measure)
        verdict = "too few patients" if moved.drifted is None else "drifted" if moved.drifted else "no drift seen"
        now = _number(moved.now) if moved.now is not None or moved.distance is None else f"+{moved.distance:.3g}"
        p = "–" if moved.p is None else f"{moved.p:.3f}" if moved.p >= 0.001 else "< 0.001"
        rows.append((label, _number(moved.before), now, p, f"{moved.patients[0]} / {moved.patients[1]}", verdict))
    return rows


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
