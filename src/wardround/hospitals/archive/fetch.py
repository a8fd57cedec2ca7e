"""Fetching a site's patients from its archive into a folder: whole, without identifiers, going on where it stopped."""

from __future__ import annotations

import fnmatch
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from pydicom.dataset import FileDataset

from wardround.errors import DataError
from wardround.hospitals.archive.client import DicomWeb, FoundSeries, FoundStudy, Refused, Unreachable
from wardround.hospitals.archive.pseudonyms import Pseudonyms
from wardround.imaging.identifiers.clean import Mapping as Identities
from wardround.imaging.identifiers.clean import cleaned, identifiers_of
from wardround.imaging.readers.dicom_file import guarded
from wardround.site.datasets import patients_of
from wardround.study.archive import Archive
from wardround.wire.files import written

# Hidden, so that no reader takes what is not whole.
_COMING = ".incoming"
_WHOLE = "whole-"
# An archive that fails for so many patients in a row fails for all.
_IN_A_ROW = 3
_ROOM = 1 << 30
_FULL = "the disk has less than a GB left; make room, and fetch again"


@dataclass
class Fetched:
    """What a fetch did, in numbers; `left_out` counts patients by reason, `again` those that may come another time."""

    studies: int = 0
    new: int = 0
    there: int = 0
    images: int = 0
    nbytes: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    again: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """The numbers for people."""
        return [
            f"studies found: {self.studies:,}",
            f"patients fetched: {self.new:,}; there before: {self.there:,}",
            f"images written: {self.images:,} ({self.nbytes / 1e9:.3g} GB)",
            *(f"left out: {count:,} ({why})" for why, count in self.left_out.most_common()),
            *(f"to fetch again: {count:,} ({why})" for why, count in self.again.most_common()),
        ]


@dataclass(frozen=True)
class _Chosen:
    """A patient's study, and the series (by name) that are fetched of it."""

    study: FoundStudy
    series: Mapping[str, str]


class Fetch:
    """One site's fetch. `say` hears how far it is, in numbers.

    A patient appears in the archive's folder when all series are there, each image written whole before it has its
    name; what is fetched of others waits in a hidden folder for the next time.
    """

    def __init__(self, archive: Archive, say: Callable[[str], None] = lambda _: None) -> None:
        self._archive = archive
        self._say = say
        self._folder = archive.folder
        self._pseudonyms = Pseudonyms(archive.keys_folder)
        self._done = Fetched()

    def run(self) -> Fetched:
        """Fetch what is not there yet.

        Raises DataError where the archive fails for one patient after the other, a limit is reached or the disk is
        full, StudyError for a query that finds too much, MissingExtra; no message names a patient.
        """
        archive = self._archive
        with self._pseudonyms.locked(), closing(DicomWeb(archive)) as web:
            key = self._pseudonyms.key(has_images=_holds_patients(self._folder))
            self._identities = Identities(key, archive.dates == "shift")
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._held = sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())
            patients = self._patients(web)
            in_a_row = 0
            for number, pseudonym in enumerate(sorted(patients), 1):
                try:
                    self._patient(web, pseudonym, patients[pseudonym])
                    in_a_row = 0
                except Unreachable as error:
                    self._done.again[str(error)] += 1
                    in_a_row += 1
                    if in_a_row >= _IN_A_ROW:
                        raise DataError(
                            f"{error}; it was so for {in_a_row} patients one after the other, so the fetch stops. Run "
                            "the same command again to go on"
                        ) from error
                except Refused as error:
                    self._done.left_out[str(error)] += 1
                    shutil.rmtree(self._folder / _COMING / pseudonym, ignore_errors=True)
                self._say(f"{number:,} of {len(patients):,} patients")
        return self._done

    def _patients(self, web: DicomWeb) -> dict[str, list[FoundStudy]]:
        """The studies that are found, by patient, the one to be taken first at the head."""
        found: dict[str, dict[str, FoundStudy]] = {}
        archive = self._archive
        asked: Iterator[Mapping[str, str]] = iter([archive.query])
        if archive.patients is not None:
            listed = patients_of(archive.patients, "archive")
            asked = ({**archive.query, "PatientID": name} for name in sorted(listed))
        for query in asked:
            for study in web.studies(query, archive.studies - self._done.studies):
                exactly = query.get("PatientID") if archive.patients is not None else None
                if exactly is not None and study.patient != exactly:
                    continue  # An archive may take `*` and `?` for any letter.
                self._done.studies += 1
                if not study.patient:
                    self._done.left_out["a study without a PatientID"] += 1
                    continue
                pseudonym = self._identities.pseudonym(study.patient, study.issuer)
                found.setdefault(pseudonym, {})[study.uid] = study
        return {
            pseudonym: sorted(
                studies.values(), key=lambda study: (study.when, study.uid), reverse=archive.study == "last"
            )
            for pseudonym, studies in found.items()
        }

    def _patient(self, web: DicomWeb, pseudonym: str, studies: Sequence[FoundStudy]) -> None:
        target = self._folder / pseudonym
        if target.is_dir():
            self._done.there += 1
            return
        chosen = self._choose(web, studies)
        coming = self._folder / _COMING / pseudonym
        places = {}
        for name, uid in chosen.series.items():
            places[name] = coming / self._identities.name(uid)
            self._series(web, chosen.study, uid, places[name])
        whole = self._folder / _COMING / f"{_WHOLE}{pseudonym}"
        shutil.rmtree(whole, ignore_errors=True)
        whole.mkdir()
        count = 0
        for name, place in places.items():
            place.rename(whole / name)
            count += sum(1 for _ in (whole / name).iterdir())
        self._pseudonyms.note(pseudonym, chosen.study.patient, chosen.study.issuer, chosen.study.uid)
        whole.rename(target)
        shutil.rmtree(coming, ignore_errors=True)
        self._done.new += 1

    def _choose(self, web: DicomWeb, studies: Sequence[FoundStudy]) -> _Chosen:
        """The first study with exactly one series for each name. Raises Refused where there is none."""
        wanted = self._archive.series
        keywords = sorted({keyword for wishes in wanted.values() for keyword in wishes})
        several = False
        for study in studies:
            listed = web.series(study.uid, keywords)
            found = {name: [one for one in listed if _fits(one, wishes)] for name, wishes in wanted.items()}
            if all(len(ones) == 1 for ones in found.values()):
                return _Chosen(study, {name: ones[0].uid for name, ones in found.items()})
            several = several or (all(found.values()))
        if several:
            raise Refused("several series of one study fit the same entry of `archive.series`; make it narrower")
        raise Refused("no study with all series of `archive.series`")

    def _series(self, web: DicomWeb, study: FoundStudy, series: str, place: Path) -> None:
        """Bring all images of a series into a folder; those that are there already are not asked for."""
        listed = web.instances(study.uid, series)
        if not listed:
            raise Unreachable("the archive lists no image of a series that it found")
        place.mkdir(parents=True, exist_ok=True)
        missing = {uid for uid in listed if not self._file(place, uid).is_file()}
        if len(missing) == len(listed) > 1:
            with closing(web.images(study.uid, series)) as images:
                for image in images:
                    missing.discard(self._keep(image, study, series, place, frozenset(missing)))
        for uid in sorted(missing):
            self._keep(web.image(study.uid, series, uid), study, series, place, frozenset({uid}))
        # An image that the archive took away meanwhile is of no series that is whole.
        kept = {self._file(place, uid).name for uid in listed}
        for path in place.iterdir():
            if path.name not in kept:
                path.unlink()

    def _file(self, place: Path, uid: str) -> Path:
        return place / f"{self._identities.name(uid)}.dcm"

    def _keep(self, image: FileDataset, study: FoundStudy, series: str, place: Path, expected: frozenset[str]) -> str:
        """Clean an image and write it; returns its identifier. Raises Refused for another one than was asked for."""
        try:
            said = identifiers_of(image, place)
            uid = said["SOPInstanceUID"]
            asked = (study.patient, study.uid, series)
            if uid not in expected or (said["PatientID"], said["StudyInstanceUID"], said["SeriesInstanceUID"]) != asked:
                raise Refused("the archive sent an image of another patient, study or series than was asked for")
            _check_whole(image, place)
            data = cleaned(image, self._identities, study.issuer)
        except Unreachable:
            raise
        except DataError as error:
            # Its detail may quote the header.
            raise Refused(str(error)) from None
        if self._held + len(data) > self._archive.gb * 1e9:
            raise DataError(
                f"the folder would hold more than {self._archive.gb:g} GB (`archive.gb`); the fetch stops here"
            )
        if shutil.disk_usage(place).free < _ROOM + len(data):
            raise DataError(_FULL)
        with written(self._file(place, uid)) as file:
            file.write(data)
        self._held += len(data)
        self._done.images += 1
        self._done.nbytes += len(data)
        return uid


def _fits(series: FoundSeries, wishes: Mapping[str, str]) -> bool:
    return all(
        any(fnmatch.fnmatchcase(value.casefold(), wish.casefold()) for value in series.values.get(keyword, ()))
        for keyword, wish in wishes.items()
    )


def _check_whole(image: FileDataset, place: Path) -> None:
    """Raise Unreachable for an image with fewer bytes of pixels than its header says."""
    with guarded("a DICOM header is damaged", place):
        if image.file_meta.TransferSyntaxUID.is_encapsulated:
            return
        numbers = (int(image.get(name) or 1) for name in ("Rows", "Columns", "SamplesPerPixel", "NumberOfFrames"))
        bits = int(image.get("BitsAllocated") or 8)
        for number in numbers:
            bits *= number
        short = len(image.get("PixelData") or b"") * 8 < bits
    if short:
        raise Unreachable("the archive sent an image with fewer pixels than its header says")


def _holds_patients(folder: Path) -> bool:
    return folder.is_dir() and any(path.is_dir() and not path.name.startswith(".") for path in folder.iterdir())
