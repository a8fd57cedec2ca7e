"""How unlike sites are whose data one machine holds, before any training: the same questions as across hospitals."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import yaml

from wardround.engines.local import LocalEngine
from wardround.errors import DataError, StudyError
from wardround.imaging.convert import DRAWINGS
from wardround.imaging.readers.folder import SiteFolder
from wardround.results.shift import Shift, write_shift
from wardround.runs.session import open_host
from wardround.runs.shift import ask_shift
from wardround.study.load import load_study, written
from wardround.study.normalise import Landmarks
from wardround.study.schema import Study
from wardround.study.sites import SitesFile, load_sites
from wardround.wire.files import write_text


def inspect_across(
    sites: SitesFile | str | Path,
    study: Study | str | Path | None = None,
    out: str | Path | None = None,
    *,
    landmarks: str | Path | None = None,
    allow_code: bool = False,
) -> Shift:
    """What the sites of a study say of their images before training, and how far they are from each other.

    Without a study the sites' folders hold `PATIENT/NAME.nii.gz`, an outline among them. With `out` a page and
    `shift.json` are written there; `landmarks` is a file for the section `task.normalise` of a study, the mean over all
    training patients. Sums leave the sites by their own rules (`egress`), and what a site gave before is on record in
    its `history`, or in `out`.

    Raises `StudyError` and `DataError` for a study or data that cannot be used, and where a site keeps what landmarks
    need.

    >>> shift = inspect_across("sites.yaml", "study.yaml")
    >>> sorted(shift.sites)
    ['Alpha', 'Beta']
    """
    near = Path(study).absolute().parent if isinstance(study, str | Path) else Path().absolute()
    known = sites if isinstance(sites, SitesFile) else load_sites(sites)
    if study is None:
        loaded = plain_study(known)
    else:
        loaded = study if isinstance(study, Study) else load_study(study, near=near)
    if landmarks is not None and isinstance(getattr(loaded.task, "normalise", None), Landmarks):
        raise StudyError("--landmarks: the study has landmarks already; take task.normalise out of it first")
    asking = load_study({**written(loaded), "site_statistics": True}, near=near)
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) if out is None else Path(out).absolute()
        host = open_host(
            asking, _with_history(known, kept), Path(folder), (), (), None, allow_code=allow_code, near=near
        )
        engine = LocalEngine(host.find)
        try:
            shift = ask_shift(host, engine)
        finally:
            engine.close()
            host.close()
    if not shift.sites:
        site, why = next(iter(shift.failed.items()))
        raise DataError(f"no site gave an answer; {site}: {why}")
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        write_shift(Path(out), shift)
    if landmarks is not None:
        write_text(Path(landmarks), landmarks_text(shift, loaded))
    return shift


def _with_history(sites: SitesFile, folder: Path) -> SitesFile:
    """The same with a place for every site's record of what it gave."""
    entries = {
        name: entry if entry.history is not None else entry.model_copy(update={"history": folder / "history" / name})
        for name, entry in sites.sites.items()
    }
    return sites.model_copy(update={"sites": entries})


def landmarks_text(shift: Shift, study: Study) -> str:
    """The section of a study with the sites' landmarks. Raises `DataError` where a training site keeps its sums."""
    found = shift.landmarks
    lacking = [site for site in study.training_sites if found is None or site not in found.sites]
    if found is None or lacking:
        first = lacking[0]
        why = shift.sites[first].withheld.values() if first in shift.sites else (shift.failed.get(first, ""),)
        raise DataError(
            f"--landmarks: {', '.join(lacking)} gave no sums of landmarks ({'; '.join(filter(None, why))}); they would "
            "be those of the other sites alone"
        )
    for number, values in enumerate(found.values):
        if any(low >= high for low, high in itertools.pairwise(values)):
            raise DataError(
                f"--landmarks: channel {number} of the images has too few grey values: two of its landmarks are one"
            )
    section = {
        "kind": "landmarks",
        "percentiles": list(found.percentiles),
        "values": [list(values) for values in found.values],
    }
    head = (
        f"# Landmarks over {found.patients} training patients of {', '.join(found.sites)}: put this into the study.\n"
        "# It stands in the model's file, so that a clinic normalises its images by it, too.\n"
    )
    return head + yaml.safe_dump({"task": {"normalise": section}}, sort_keys=False, default_flow_style=None)


def plain_study(sites: SitesFile) -> Study:
    """A study of what all patients of all sites have: outlines in volumes, a file each. Raises `StudyError`."""
    folders = {name: SiteFolder(entry.data, name) for name, entry in sites.sites.items()}
    complete = [{c for c in folder.contrasts if not folder.lacking(c)} for folder in folders.values()]
    common = set.intersection(*complete) if complete else set()
    images, drawn = sorted(common - DRAWINGS), sorted(common & DRAWINGS)
    if not images or not drawn:
        raise StudyError(
            "without a study the folders must hold PATIENT/NAME.nii.gz, with one image and one outline "
            f"({', '.join(sorted(DRAWINGS))}) that every patient of every site has; name a study that says what the "
            "images are: wardround inspect --across SITES STUDY"
        )
    task: dict[str, Any] = {
        "kind": "segmentation",
        "images": images,
        "mask": drawn[0],
        "channels": len(images),
        "structures": {drawn[0]: "any"},
        # All patients are described: nothing is trained.
        "split": {"validation": 0.0, "test": 0.0},
    }
    # One patient alone cannot train.
    roles = {name: {"role": "train" if len(folder) > 1 else "unseen"} for name, folder in folders.items()}
    return load_study({"name": "sites", "sites": roles, "task": task})
