"""A study and a sites file proposed for a folder of scans."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from wardround.errors import DataError
from wardround.imaging.convert import DRAWINGS, beside_images, inspect_path, is_site
from wardround.imaging.datasets.ct import CONTRAST as CT
from wardround.imaging.proposal import HEAD, TAIL, check_training, site_line
from wardround.imaging.propose_ct import ct_sites, propose_ct
from wardround.imaging.propose_raw import propose_raw
from wardround.imaging.raw_inspect import raw_sites
from wardround.imaging.readers.folder import SiteFolder
from wardround.imaging.readers.raw import is_raw
from wardround.study.schema import RESERVED_NAMES

_STUDY = (
    HEAD
    + """\
sites:
{sites}

# The scanner simulated at every site; a site may have its own `acquisition` above.
acquisition:
  kind: mri
  coils: 8
  mask: {{family: random, acceleration: 4, calibration: 0.08}}
  noise: 0.005          # of the image's peak, per coil

task:
  kind: reconstruction
  contrasts: {contrasts}   # every patient has these
  size: [{height}, {width}]       # images are cropped or padded to it, never interpolated
  slices: {{every: 1, minimum_foreground: 0.05}}
  split: {{validation: 0.15, test: 0.2}}   # shares of each site's patients

model:
  kind: modl
  preset: small_complex # tiny | small_complex | paper; `small` takes images for real (docs/models.md)

"""
    + TAIL
)


_SITES = """\
# Where each site's data lie on this machine: no part of the study. ${VARIABLE} and ~ are replaced.
# `per_site_results: false` keeps a site's own results at the site.
"""


def propose_study(folder: Path) -> tuple[str, str]:
    """Return a commented study file and a sites file (YAML) for a folder of sites, or for one site's folder.

    MRI, `SITE/PATIENT/CONTRAST.nii.gz`: the contrasts that every patient has, and the commonest size in plane. CT,
    `SITE/PATIENT/ct.nii.gz` in HU or DICOM images in `SITE/PATIENT/`: a field of view that holds every body, and a
    simulated scanner for every site. Raw data of MRI, `SITE/PATIENT/FILE.h5` or `SITE/FILE.h5` and the like: what is
    done with them. A site with one patient becomes `unseen`. Raises DataError where no site can train, no contrast is
    common, or images of CT or raw data cannot be used.
    """
    root = folder.resolve()
    scans = ct_sites(root)
    if scans and not _has_contrasts(root):
        sites = dict(zip(_names(path.name for path in scans), scans, strict=True))
        return propose_ct(_title(root), sites), _sites_file(sites)
    if raw := _raw_of(root):
        named = dict(zip(_names(path.resolve().name for path in raw), raw, strict=True))
        return propose_raw(_title(root), named), _sites_file(named)
    return _propose_mri(folder)


def _raw_of(root: Path) -> list[Path]:
    """The sites with raw data, where there are no images: what a study trains on is said by its files."""
    if not root.is_dir() or is_site(root) or any(is_site(child) for child in root.iterdir() if child.is_dir()):
        return []
    return raw_sites(root)


def _has_contrasts(root: Path) -> bool:
    """Whether patients have volumes of anything but CT."""
    sites = (site for site in (root, *root.iterdir()) if site.is_dir() and is_site(site))
    return any({*SiteFolder(site, site.name).contrasts} - {CT} - DRAWINGS for site in sites)


def _title(root: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", root.name).strip("._-")[:64] or "study"


def _propose_mri(folder: Path) -> tuple[str, str]:
    found = inspect_path(folder)
    if not found.sites:
        what = f" (this is {found.kind})" if "DICOM" in found.kind or "CT" in found.kind else ""
        raise DataError(
            f"no study can be proposed{what}: the folder must hold SITE/PATIENT/CONTRAST.nii.gz, or for CT "
            "SITE/PATIENT/ct.nii.gz or SITE/PATIENT/*.dcm, or raw data in SITE. A segmentation, "
            "classification or chain of MR in DICOM is written by hand (docs/data.md)",
            detail=str(folder),
        )
    summaries = list(found.sites.values())
    shared = frozenset.intersection(*(summary.complete for summary in summaries))
    common = sorted(shared - {CT})
    if not common:
        have = "; ".join(f"{s.name}: {', '.join(sorted(s.complete)) or 'none'}" for s in summaries)
        raise DataError(
            "no contrast is common to every patient of every site; `wardround inspect` lists what there is",
            detail=f"complete are {have}",
        )
    check_training((summary.patients for summary in summaries), *beside_images(folder))
    sizes: Counter[tuple[int, int]] = Counter()
    for summary in summaries:
        sizes.update(summary.sizes)
    if not sizes:
        raise DataError("no image can be read; `wardround inspect` lists what is wrong")
    height, width = sizes.most_common(1)[0][0]
    names = _names(summary.name for summary in summaries)
    root = folder.resolve()
    paths = [root if is_site(root) else root / summary.name for summary in summaries]
    lines = (site_line(name, s.patients) for name, s in zip(names, summaries, strict=True))
    study = _STUDY.format(
        name=_title(root),
        sites="\n".join(lines),
        contrasts=json.dumps(common),
        height=height,
        width=width,
    )
    return study, _sites_file(dict(zip(names, paths, strict=True)))


def _sites_file(sites: Mapping[str, Path]) -> str:
    rules = "    egress: {per_site_results: true}\n"
    entries = "".join(f"  {name}:\n    data: {_quoted(path)}\n{rules}" for name, path in sites.items())
    return f"{_SITES}sites:\n{entries}"


def _quoted(path: Path) -> str:
    """Return a path as YAML text; JSON's quotes are YAML's."""
    return json.dumps(str(path), ensure_ascii=False)


def _names(folders: Iterable[str]) -> list[str]:
    """Return a valid and unique site name for each folder, in the folder's own script."""
    names: list[str] = []
    for folder in folders:
        composed = unicodedata.normalize("NFC", folder)
        name = "".join(c if _in_names(c) else "-" for c in composed).strip("-")[:28] or "site"
        if not name[:1].isalpha() or name in RESERVED_NAMES:
            name = f"S-{name}"
        base, number = name, 1
        while name in names:
            number += 1
            name = f"{base}-{number}"
        names.append(name)
    return names


def _in_names(character: str) -> bool:
    """Whether a site's name may hold a character: letters, marks and digits of any script, `_` and `-`."""
    return character in "_-" or unicodedata.category(character)[0] in "LMN"


def skipped(folder: Path) -> list[str]:
    """What a proposed study leaves out of a folder, and why, for people at the machine: entries by name.

    Files and folders that are hidden are left out unsaid.
    """
    root = folder.resolve()
    if root in (of_ct := ct_sites(root)):
        return []
    if raw := _raw_of(root):
        beside = (child for child in sorted(root.iterdir()) if child not in raw and not is_raw(child))
        lists = [] if root in raw else [child.name for child in beside if not child.name.startswith(".")]
        return [f"{name}: it holds no raw data" for name in lists]
    if is_site(root):
        others = (child for child in sorted(root.iterdir()) if child.is_dir() and not any(child.glob("[!.]*.nii*")))
        why = "it holds no CONTRAST.nii.gz, so it is no patient of the site {}"
        site = "; it looks like a site: then move the images that lie beside it into SITE/PATIENT/"
        return [
            f"{child.name}: {why.format(root.name)}{site if is_site(child) else ''}"
            for child in others
            if not child.name.startswith(".")
        ]
    ct = bool(of_ct) and not _has_contrasts(root)
    kept = set(of_ct) if ct else {child for child in root.iterdir() if child.is_dir() and is_site(child)}
    found = []
    for child in sorted(root.iterdir()):
        if child in kept or child.name.startswith("."):
            continue
        if not child.is_dir():
            why = "a file beside the sites' folders; a site is a folder SITE/PATIENT/CONTRAST.nii.gz"
        elif not any(child.iterdir()):
            why = "an empty folder"
        elif not ct and child in of_ct:
            why = "CT, and the other sites are MRI: a study has one modality; give `init` its folder by itself"
        elif any(child.rglob("*.nii*")):
            why = "its images do not lie in SITE/PATIENT/CONTRAST.nii.gz; move them there"
        else:
            why = "it holds neither NIfTI images nor CT in DICOM"
        found.append(f"{child.name}: {why}")
    return found
