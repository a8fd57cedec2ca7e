"""The embedded demo: brain phantoms for four hospitals, and the study that trains on them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from wardround.physics.phantoms import DEMO_SITES, make_site
from wardround.study.load import load_study, read_yaml
from wardround.study.schema import Study
from wardround.study.sites import SiteData, SitesFile

PATIENTS = {"train": 8, "unseen": 3}
SEED = 2026


def demo_study(data: Path, overrides: Sequence[str]) -> tuple[Study, SitesFile]:
    """Make the phantoms where they are not there yet; the demo's study and sites. Raises `MissingExtra`."""
    for site in DEMO_SITES:
        folder = data / site.name
        done = folder / ".complete"
        if not done.exists():
            make_site(data, site, PATIENTS[site.role], SEED)
            done.touch()
    with_files = files("wardround").joinpath("examples", "demo.yaml")
    study = load_study(read_yaml(Path(str(with_files)), "study"), overrides)
    sites = SitesFile(sites={site.name: SiteData(data=(data / site.name).resolve()) for site in DEMO_SITES})
    return study, sites
