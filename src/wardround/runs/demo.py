"""The embedded demos: brain phantoms for made-up hospitals, and the studies on them.

`DEMO` is the chain from k-space over the image to the tumour, with one patient to train on at each of four hospitals
and the same kind of scan on unlike scanners: training together helps.
`CONTRASTS` reconstructs another kind of scan at every hospital: it does not help, and a report must say that, too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from wardround.errors import StudyError
from wardround.imaging.phantoms import CONTRAST_SITES, DEMO_SITES, PhantomSite, make_site
from wardround.plan.arms import Comparison
from wardround.runs.watching import PHANTOMS as MAKING
from wardround.runs.watching import Phase
from wardround.study.load import load_study, read_yaml
from wardround.study.schema import Study
from wardround.study.sites import SitesFile, load_sites
from wardround.wire.files import write_text

PHANTOMS = "phantoms.json"
_SITES_FILE = """# Where the phantoms of the demo lie: for `wardround evaluate`, `check` and `audit`.
sites:
"""


@dataclass(frozen=True)
class Demo:
    """An embedded study `examples/NAME.yaml`, its hospitals, and how many patients of how many slices each one has.

    `compare` names what the federation is compared with.
    """

    name: str
    sites: tuple[PhantomSite, ...]
    train: int
    unseen: int
    slices: int
    compare: tuple[Comparison, ...]

    def patients(self, site: PhantomSite) -> int:
        """How many patients a hospital has."""
        return self.train if site.role == "train" else self.unseen

    @property
    def total(self) -> int:
        """How many patients all hospitals have."""
        return sum(self.patients(site) for site in self.sites)


# Of 10 patients one trains, two validate and seven test: enough for an interval at every hospital. Pooled training
# would take a third of the time and is no part of the question whether to train together.
DEMO = Demo("demo", DEMO_SITES, train=10, unseen=7, slices=4, compare=("local",))
CONTRASTS = Demo("contrasts", CONTRAST_SITES, train=8, unseen=3, slices=12, compare=("local", "pooled"))


def demo_study(
    data: Path, overrides: Sequence[str] = (), *, demo: Demo = DEMO, phase: Phase = lambda *_: None
) -> tuple[Study, SitesFile]:
    """Make the phantoms where they are not there yet; the demo's study and sites, which `data/sites.yaml` holds, too.

    Phantoms follow the study: its seed, and the size of its images. `phase` is called after each patient, from a thread
    of its own. Raises `MissingExtra`, and `StudyError` where `data` holds anything else under the hospitals' names:
    phantoms of another seed, size or demo, or files that are no phantoms.
    """
    embedded = read_yaml(Path(str(files("wardround").joinpath("examples", f"{demo.name}.yaml"))), "study")
    study = load_study(embedded, overrides)
    if study.task.kind != embedded["task"]["kind"]:
        raise StudyError(f"the demo {demo.name} is a {embedded['task']['kind']}: leave task.kind as it is")
    task: Any = study.task  # both kinds say how large their slices are
    size = max(task.size)
    _claim(data, demo, _recipe(demo, study.seed, size))
    count = iter(range(1, demo.total + 1))
    phase(MAKING, 0, demo.total)

    def made() -> None:
        phase(MAKING, next(count), demo.total)

    for site in demo.sites:
        done = data / site.name / ".complete"
        if done.exists():
            for _ in range(demo.patients(site)):
                made()
        else:
            make_site(data, site, demo.patients(site), study.seed, size=size, slices=demo.slices, made=made)
            done.touch()
    sites = data / "sites.yaml"
    write_text(sites, _SITES_FILE + "".join(f"  {s.name}: {{data: {s.name}}}\n" for s in demo.sites))
    return study, load_sites(sites)


def _recipe(demo: Demo, seed: int, size: int) -> dict[str, Any]:
    """All that decides the phantoms of a folder."""
    sites = {site.name: {**asdict(site), "patients": demo.patients(site)} for site in demo.sites}
    return {"seed": seed, "size": size, "slices": demo.slices, "sites": sites}


def _claim(data: Path, demo: Demo, recipe: dict[str, Any]) -> None:
    """Write what is going to be made; raises StudyError where a folder holds anything else."""
    path = data / PHANTOMS
    if path.exists():
        if path.read_text(encoding="utf-8") != _text(recipe):
            raise StudyError(
                "the folder holds phantoms of another seed, image size or demo; choose another --out, or delete it",
                detail=str(data),
            )
        return
    if foreign := [site.name for site in demo.sites if (data / site.name).exists()]:
        raise StudyError(
            f"{foreign[0]} is there already, and the demo did not make it; choose another --out, or move it away",
            detail=str(data),
        )
    write_text(path, _text(recipe))


def _text(recipe: dict[str, Any]) -> str:
    return json.dumps(recipe, indent=2, sort_keys=True) + "\n"
