"""Runs in which every party has a process, a folder and a part of the sites file of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from wardround.engines.apart import ApartEngine
from wardround.protection.rounding import study_root
from wardround.results.schema import Result
from wardround.runs.conduct import coordinate
from wardround.site.process import AgreedStudy, spec_of
from wardround.storage.store import SiteStore
from wardround.study.schema import Study
from wardround.study.sites import SitesFile

# What two runs of one study do not share: how long they took.
UNLIKE = ("seconds",)
_watched: list[Callable[[str], None]] = []


def _hook(event: str, args: Sequence[Any]) -> None:
    if _watched and event in ("open", "sqlite3.connect", "os.listdir", "os.scandir") and args:
        for seen in _watched:
            seen(str(args[0]))


@contextmanager
def opened() -> Iterator[list[str]]:
    """Every path that this process opens or lists, meanwhile."""
    if not getattr(sys, "_wardround_hook", False):
        sys.addaudithook(_hook)
        sys._wardround_hook = True  # type: ignore[attr-defined]
    found: list[str] = []
    seen = found.append
    _watched.append(seen)
    try:
        yield found
    finally:
        _watched.remove(seen)


def folder_of(folder: Path, site: str) -> Path:
    """Where a site keeps what is its own."""
    return folder / "hospitals" / site


def engine_of(
    study: Study,
    sites: SitesFile,
    folder: Path,
    compare: Sequence[str] = (),
    *others: tuple[Study, Path, Sequence[str]],
    floor: int = 1,
    keyed: bool = False,
) -> ApartEngine:
    """A process for each site, none of them started yet; their updates are rounded as on one machine unless `keyed`.

    The sites take part in `others`, further studies with their folders and comparisons, too.
    """
    specs = {}
    studies = [(study, folder, compare), *others]
    for site in dict.fromkeys(name for each, _, _ in studies for name in each.sites):
        agreed = [
            AgreedStudy(each, folder_of(where, site), tuple(arms))
            for each, where, arms in studies
            if site in each.sites
        ]
        own = folder_of(folder, site)
        own.mkdir(parents=True, exist_ok=True)
        specs[site] = own / "spec.json"
        root = None if keyed else study_root(study.seed)
        spec = spec_of(site, sites, own / "spool", agreed, rounding_root=root, floor=floor)
        specs[site].write_text(json.dumps(spec), encoding="utf-8")
    return ApartEngine("wardround.site.process:agent_finder", specs, folder / "coordinator-spool")


def apart(study: Study, sites: SitesFile, folder: Path, compare: Sequence[str] = (), **how: Any) -> Result:
    """A whole run, its parties apart; the coordinator's folder is `folder/out`."""
    with closing(engine_of(study, sites, folder, compare)) as engine:
        return coordinate(study, folder / "out", engine, compare=compare, quiet=True, allow_code=True, **how)


def give_root(folder: Path, site: str, root: str) -> None:
    """Put a secret root of privacy noise into a site's folder, as if the site had drawn it."""
    with closing(SiteStore(folder / "work" / "sites" / site / "privacy")) as store:
        assert store.write_once("privacy/root", 0, root) == root


def comparable(values: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same in a result of the same study."""
    found = {key: value for key, value in values.items() if key not in UNLIKE}
    # The delivery holds the model's card, and that says how long the run took: `8.2 s`, `12.1 s`.
    down = found["traffic"]["study"]["down"]
    study = {**found["traffic"]["study"], "down": {kind: count for kind, count in down.items() if kind != "other"}}
    return {**found, "traffic": {**found["traffic"], "study": study}}
