"""What the headers of a site's CT say that somebody should know before training; nothing of it leaves the site."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import chain

from wardround.imaging.readers.places import Place, regular_gaps, unevenness


def remarks_on(named: Sequence[Collection[str]], series: Sequence[Sequence[Sequence[Place]]]) -> Iterator[str]:
    """Remarks on patients' folders: the PatientIDs of each, and where the slices of each of its series lie."""
    if mixed := sum(len(of_patient) > 1 for of_patient in series):
        yield f"{mixed} of {len(series)} patients' folders mix several series; every image is an example"
    folders = Counter(chain.from_iterable(named))
    if shared := sum(any(folders[name] > 1 for name in names) for names in named):
        yield (
            f"{shared} of {len(named)} patients' folders name a PatientID that another of them names, too; if that is "
            "one person, put all files into one folder: a folder is what is split, counted and protected as one patient"
        )
    every = list(chain.from_iterable(series))
    if uneven := sum(bool(unevenness(places)) for places in every):
        yield f"in {uneven} of {len(every)} series slices are missing, doubled or uneven; every image is an example"
    if gaps := sum(bool(regular_gaps(places)) for places in every if not unevenness(places)):
        yield (
            f"in {gaps} of {len(every)} series slices may be missing: their distances or numbers are not those of "
            "neighbours; every image is an example"
        )
