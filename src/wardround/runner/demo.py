"""The embedded demo: brain phantoms for four hospitals, and the study in which three of them train."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from wardround.physics.phantoms import DEMO_SITES, make_site
from wardround.runner.watching import PHANTOMS, Phase
from wardround.study.load import load_study, read_yaml
from wardround.study.schema import Study
from wardround.study.sites import SitesFile, load_sites

PATIENTS = {"train": 8, "unseen": 3}
SEED = 2026
_SITES_FILE = """# Where the phantoms of the demo lie: for `wardround evaluate`, `check` and `audit`.
sites:
"""


def demo_study(data: Path, overrides: Sequence[str], phase: Phase = lambda *_: None) -> tuple[Study, SitesFile]:
    """Make the phantoms where they are not there yet; the demo's study and sites, which `data/sites.yaml` holds, too.

    Raises `MissingExtra`.
    """
    for number, site in enumerate(DEMO_SITES):
        folder = data / site.name
        done = folder / ".complete"
        if not done.exists():
            phase(PHANTOMS, number, len(DEMO_SITES))
            make_site(data, site, PATIENTS[site.role], SEED)
            done.touch()
            phase(PHANTOMS, number + 1, len(DEMO_SITES))
    with_files = files("wardround").joinpath("examples", "demo.yaml")
    study = load_study(read_yaml(Path(str(with_files)), "study"), overrides)
    sites = data / "sites.yaml"
    sites.write_text(_SITES_FILE + "".join(f"  {s.name}: {{data: {s.name}}}\n" for s in DEMO_SITES), encoding="utf-8")
    return study, load_sites(sites)
