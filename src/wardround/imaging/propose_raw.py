"""A study proposed for folders of raw data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from wardround.errors import DataError
from wardround.imaging.proposal import HEAD, TAIL, check_training, site_line
from wardround.imaging.raw_inspect import RawSummary, summarise_raw

_RETROSPECTIVE = """\
  kind: mri_raw
  sampling: retrospective   # full scans, of which lines are left out afterwards; one mask a patient
  mask: {family: random, acceleration: 4, calibration: 0.08}
  reference: rss            # what images are compared with: root sum of squares of the full scan; or combined"""

_OWN = """\
  kind: mri_raw
  sampling: own             # files that were undersampled when they were measured
  reference: {reference}"""
_WITH = "file           # the reference image in each file"
_WITHOUT = "none           # no file says what the true image is"
_ALONE = "  supervision: {kind: split}   # so sites learn from measured samples that are held out\n"

_STUDY = (
    HEAD
    + """\
sites:
{sites}

# What is done with the raw data that each site's scanner measured; a site may have its own `acquisition` above.
acquisition:
{acquisition}

task:
  kind: reconstruction
  size: [{height}, {width}]       # images are cropped or padded to it, never interpolated
{supervision}  slices: {{every: 1, minimum_foreground: 0.05}}
  split: {{validation: 0.15, test: 0.2}}   # shares of each site's patients

model:
  kind: cascade         # for real scanners; or modl, of a thirtieth of its size
  preset: small         # tiny | small | paper

"""
    + TAIL
)


def propose_raw(name: str, sites: Mapping[str, Path]) -> str:
    """Return a commented study (YAML) for sites with raw data; one slice of every file is read.

    Full scans are undersampled afterwards. Where most files are no full scans, files are taken as they were measured,
    with their reference images where all have one. What this leaves out, and what cannot be read, is said beside each
    site. `task.size` is the commonest size of a slice. Raises DataError where no file can be used and where no site can
    train.
    """
    found = {site: summarise_raw(path) for site, path in sites.items()}
    summaries = list(found.values())
    files, full, references = (sum(getattr(one, key) for one in summaries) for key in ("files", "full", "references"))
    if not files:
        raise DataError("no raw data file can be read; `wardround inspect` lists what is wrong")
    own = 2 * full < files
    alone = own and references < files
    sizes: Counter[tuple[int, int]] = Counter()
    for one in summaries:
        sizes.update(one.sizes)
    if not sizes:
        raise DataError(
            "no raw data were measured on Cartesian lines, which a study learns from; radial and spiral scans are "
            "reconstructed by a model of `acquisition.kind: mri_noncartesian`, which learns from images"
        )
    check_training(one.patients for one in summaries)
    height, width = sizes.most_common(1)[0][0]
    return _STUDY.format(
        name=name,
        sites="\n".join(_site(site, one, own=own) for site, one in found.items()),
        acquisition=_RETROSPECTIVE if not own else _OWN.format(reference=_WITHOUT if alone else _WITH),
        supervision=_ALONE if alone else "",
        height=height,
        width=width,
    )


def _site(name: str, summary: RawSummary, *, own: bool) -> str:
    said = []
    if others := summary.full if own else summary.files - summary.full:
        which = f"{others} of {summary.files} files are {'' if own else 'no '}full scans"
        said.append(f"{which}, which this study leaves out")
    if broken := sum(map(len, summary.problems.values())):
        said.append(f"{broken} more cannot be read: see `wardround inspect`")
    return site_line(name, summary.patients, *said)
