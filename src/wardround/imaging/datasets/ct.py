"""The CT examples of one site: slices in Hounsfield units on the grid that a scanner is simulated on. No torch here."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from wardround.errors import DataError
from wardround.imaging.datasets.ct_remarks import remarks_on
from wardround.imaging.datasets.memory import CACHE_BYTES, ScanCache
from wardround.imaging.datasets.mri import SPLITS, BoolArray, SliceExample, chosen, fill_holes
from wardround.imaging.datasets.split import Deal, Role, SplitName, by_seed
from wardround.imaging.readers.ct_files import KINDS, NIFTI, patient_files
from wardround.imaging.readers.ct_protocol import CTProtocol, facts_of
from wardround.imaging.readers.dicom import AIR, CTSlice, read_slice
from wardround.imaging.readers.embeddings import Embeddings
from wardround.imaging.readers.folder import no_patient, patient_folders
from wardround.imaging.readers.hounsfield import check_air, check_hounsfield, check_tissue
from wardround.imaging.readers.places import Place
from wardround.imaging.readers.volume import FloatArray, Volume, read_volume
from wardround.study.protocols import HeaderFacts
from wardround.study.tasks import Slices, Split
from wardround.wire.canonical import canonical_json
from wardround.wire.files import reason

CONTRAST = "ct"
_EXPECTED = " or SITE/PATIENT/".join(KINDS)
BODY = -500.0  # halfway between air and tissue
_BLANKET = 2.0  # mm; thinner things than twice that, as blankets and table tops, are no body
_SHEAR = 0.01  # of a step aside, as for slices in DICOM; rounding and registration leave less


@dataclass(frozen=True)
class Grid:
    """A square grid around the isocentre: (rows, columns), edge of a pixel in mm, radius in mm that a scanner sees."""

    size: tuple[int, int]
    pixel: float
    radius: float

    def inside(self) -> BoolArray:
        """Where the middle of a pixel lies within the radius: (rows, columns)."""
        y, x = ((np.arange(count) - (count - 1) / 2) * self.pixel for count in self.size)
        return np.asarray(np.hypot(y[:, None], x[None]) <= self.radius, dtype=np.bool_)


@dataclass(frozen=True, eq=False)
class Slice:
    """An axial image in HU, at least -1024, (rows, columns), with the distance of its rows and columns in mm.

    `protocol`, `series`, `place` and `patient` (an identifier) are what its header says; NIfTI says nothing.
    """

    hu: FloatArray
    spacing: tuple[float, float]
    protocol: CTProtocol | None = None
    series: str = ""
    place: Place | None = None
    patient: str = ""


@dataclass(frozen=True, eq=False)
class BodyOutline:
    """The body in a slice: its mask, the middle of its bounding box in pixels, its reach from there in mm."""

    mask: BoolArray
    middle: tuple[float, float]
    reach: float

    @classmethod
    def of(cls, image: Slice) -> BodyOutline:
        """The largest connected piece of tissue with everything inside; without any, the middle of the image."""
        rows, columns = (max(1, round(_BLANKET / step)) for step in image.spacing)
        tissue = opened(image.hu > BODY, (2 * rows + 1, 2 * columns + 1))
        labels, pieces = ndimage.label(tissue)
        if not pieces:
            middle = ((image.hu.shape[0] - 1) / 2, (image.hu.shape[1] - 1) / 2)
            return cls(np.zeros(image.hu.shape, dtype=np.bool_), middle, 0.0)
        mask = fill_holes(np.asarray(labels == 1 + np.argmax(np.bincount(labels.ravel())[1:]), dtype=np.bool_))
        y, x = np.nonzero(mask)
        middle = ((y.min() + y.max()) / 2, (x.min() + x.max()) / 2)
        reach = np.hypot((y - middle[0]) * image.spacing[0], (x - middle[1]) * image.spacing[1]).max()
        return cls(mask, middle, float(reach))


def opened(mask: BoolArray, box: tuple[int, int]) -> BoolArray:
    """A mask (rows, columns) without what no box of (rows, columns) fits into (`binary_opening`, but faster)."""
    found = mask.view(np.uint8)
    for filtered in (ndimage.minimum_filter1d, ndimage.maximum_filter1d):
        for axis, size in enumerate(box):
            found = filtered(found, size, axis, mode="constant", cval=0)
    return np.asarray(found, dtype=np.bool_)


class CTFolder:
    """The slices of one site, `FOLDER/PATIENT/*.dcm` or `FOLDER/PATIENT/ct.nii.gz`, from one folder or several.

    A patient's files may lie in folders of their own, as archives export studies and series. Every DICOM file is a
    slice of its own, whatever series it is of, in the order of paths; a NIfTI volume in HU gives axial slices, turned
    as DICOM shows them (rows to the back, columns to the left), and is taken instead of DICOM. Patients are numbered
    folder by folder in the order of their names; nothing outside this class sees those names. `unused` counts folders
    in which nothing was found, which are no patients. Raises DataError for a missing folder, for one without patients,
    for a patient who is in two of them, and where one has none of the `embeddings`, which are named like the folders.
    """

    def __init__(self, source: Path | Sequence[Path], site: str, embeddings: Embeddings | None = None) -> None:
        self.site = site
        folders = patient_folders(source, site, _EXPECTED)
        found = {folder: files for folder in folders if (files := patient_files(folder))}
        if not found:
            raise no_patient(site, _EXPECTED, source)
        self._patients = list(found.values())
        self._folders = list(found)
        self.unused = len(folders) - len(found)
        self._embeddings = embeddings
        if embeddings is not None:
            embeddings.require([folder.name for folder in found])

    def __len__(self) -> int:
        return len(self._patients)

    def slices(self, patient: int) -> list[Slice]:
        """Return a patient's slices. Raises DataError for files that cannot be used and for values that are no HU."""
        files = self._patients[patient]
        try:
            if files[0].name in NIFTI:
                return [slice_ for path in files for slice_ in slices_of(read_ct_volume(path))]
            read = [read_slice(path, alone=False) for path in files]
            lowest: dict[str, list[float]] = {}
            for one in read:
                lowest.setdefault(one.series, []).append(one.lowest)
            check_air(lowest, self._folders[patient])
            check_tissue((one.hu for one in read), self._folders[patient])
            return [_slice_of(one) for one in read]
        except DataError as error:
            raise DataError(f"site {self.site}: {error}", detail=error.detail) from error

    def slice(self, patient: int, number: int) -> Slice:
        """Return one of a patient's slices, whose values `slices` has looked at. Raises DataError."""
        files = self._patients[patient]
        if files[0].name in NIFTI:
            return self.slices(patient)[number]
        try:
            one = read_slice(files[number], alone=False)
        except DataError as error:
            raise DataError(f"site {self.site}: {error}", detail=error.detail) from error
        return _slice_of(one)

    def prompt(self, patient: int) -> FloatArray | None:
        """Return a patient's embedding, float32 (tokens, dimension), where the site provides any."""
        return None if self._embeddings is None else self._embeddings.of(self._folders[patient].name)

    def name(self, patient: int) -> str:
        """Return the name of a patient's folder: it stays at the site."""
        return self._folders[patient].name

    def place(self, patient: int) -> str:
        """Return where a patient's files lie: for the `detail` of errors only."""
        return str(self._folders[patient])

    def digest(self, patient: int) -> str:
        """Return the sha256 (hex) over the content of a patient's files and embedding. Raises DataError."""
        try:
            contents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in self._patients[patient]]
        except OSError as error:
            said = f"site {self.site}: an image file cannot be read ({reason(error)})"
            raise DataError(said, detail=str(error.filename)) from error
        if self._embeddings is not None:
            contents.append(self._embeddings.digest(self._folders[patient].name))
        return hashlib.sha256("/".join(contents).encode()).hexdigest()


def _slice_of(one: CTSlice) -> Slice:
    return Slice(one.hu, one.spacing, one.protocol, one.series, one.place, one.patient)


@dataclass(frozen=True, eq=False)
class _Placed:
    """A slice on the grid: HU and the body's mask."""

    hu: FloatArray
    body: BoolArray

    @property
    def nbytes(self) -> int:
        return self.hu.nbytes + self.body.nbytes


class CTIndex:
    """The slices of a site as examples on a simulation's grid, split by patient.

    Slices are resampled by area to the grid by their physical spacing, the body's bounding box in the middle; what lies
    outside the circle that the scanner sees (a table, a blanket) is air. All files of the patients of `served` splits
    are read once here, and again when asked for, with images kept in memory up to `cache_bytes`; other splits have
    nobody, though the fingerprint is that of the whole site. Raises DataError where one of these files cannot be used,
    where a body does not fit the circle, and where a training site is left without training examples.
    """

    def __init__(
        self,
        folder: CTFolder,
        grid: Grid,
        *,
        slices: Slices,
        split: Split,
        seed: int,
        role: Role = "train",
        deal: Deal = by_seed,
        served: Sequence[SplitName] = SPLITS,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._folder = folder
        self._grid = grid
        self._slices = slices
        self._split = deal(folder.site, [folder.name(i) for i in range(len(folder))], split, seed, role)
        self._served = {name: self._split[name] if name in served else () for name in SPLITS}
        self._cache = ScanCache[_Placed](cache_bytes)
        self._inside = grid.inside()
        self._protocols: dict[int, frozenset[CTProtocol]] = {}
        self._series: dict[int, list[list[Place]]] = {}
        self._named: dict[int, frozenset[str]] = {}
        self._shares = {patient: self._survey(patient) for patient in sorted(chain(*self._served.values()))}
        self._check_fit()

    @property
    def site(self) -> str:
        """The site's name."""
        return self._folder.site

    def name(self, patient: int) -> str:
        """Return the name of a patient's folder: it stays at the site."""
        return self._folder.name(patient)

    def patients(self, split: SplitName) -> tuple[int, ...]:
        """Return the numbers of the patients of a split, ascending."""
        return self._served[split]

    def examples(self, split: SplitName, slices: Slices | None = None) -> tuple[SliceExample, ...]:
        """Return the examples of a split by patient and slice; `slices` replaces the own rule.

        `minimum_foreground` is the body's share of the field of view.
        """
        rule = slices or self._slices
        found = tuple(
            SliceExample(patient, CONTRAST, int(number))
            for patient in self._served[split]
            for number in chosen(self._shares[patient][0], rule)
        )
        if self._served[split] and not found:
            raise DataError(
                f"site {self.site}: in no {split} slice does the body fill {rule.minimum_foreground:.0%} of the field "
                "of view; lower `slices.minimum_foreground`"
            )
        return found

    def image(self, example: SliceExample) -> FloatArray:
        """Return a slice in HU on the grid, float32 (rows, columns), at least -1024."""
        return self._placed(example).hu

    def mask(self, example: SliceExample) -> BoolArray:
        """Return where the body is, bool (rows, columns) on the grid."""
        return self._placed(example).body

    def turn(self, example: SliceExample) -> None:
        """Images of CT are turned as they are read: the patient's front on top, his left on the right."""

    def prompt(self, example: SliceExample) -> FloatArray | None:
        """Return the embedding of an example's patient, float32 (tokens, dimension), where the site provides any."""
        return self._folder.prompt(example.patient)

    def fingerprint(self) -> str:
        """Return a sha256 (hex) over what training can see: image content, split, the grid, embeddings.

        Neither names nor paths have a part; folders renamed so that patients change their split change it.
        """
        seen = {name: sorted(self._folder.digest(patient) for patient in self._split[name]) for name in SPLITS}
        grid = {"size": list(self._grid.size), "pixel": self._grid.pixel, "radius": self._grid.radius}
        return hashlib.sha256(canonical_json({"patients": seen, "grid": grid})).hexdigest()

    def remarks(self) -> tuple[str, ...]:
        """What somebody should know of the data before training on them; nothing that leaves the site."""
        found = list(remarks_on(list(self._named.values()), list(self._series.values())))
        if unused := self._folder.unused:
            folders = unused + len(self._folder)
            found.append(f"{unused} of {folders} folders hold neither {' nor '.join(KINDS)}; they are left out")
        return tuple(found)

    def header_facts(self, minimum: int) -> HeaderFacts:
        """What the headers of training patients say of the scanners, where at least `minimum` of them agree."""
        return facts_of((self._protocols[patient] for patient in self._served["train"]), minimum)

    def _survey(self, patient: int) -> tuple[FloatArray, FloatArray]:
        """The body's share of the field of view and its reach in mm, of every slice."""
        area = np.pi * self._grid.radius**2
        shares, reaches = [], []
        images = self._folder.slices(patient)
        self._protocols[patient] = frozenset(image.protocol for image in images if image.protocol is not None)
        self._named[patient] = frozenset(image.patient for image in images if image.patient)
        series: dict[str, list[Place]] = {}
        for image in images:
            series.setdefault(image.series, []).extend([image.place] if image.place else [])
        self._series[patient] = list(series.values())
        for number, image in enumerate(images):
            body = BodyOutline.of(image)
            shares.append(body.mask.sum() * image.spacing[0] * image.spacing[1] / area)
            reaches.append(body.reach)
            self._cache.get((patient, number), partial(self._place, image, body))
        return np.array(shares, dtype=np.float32), np.array(reaches, dtype=np.float32)

    def _check_fit(self) -> None:
        reaches = np.concatenate([np.zeros(0), *(reach for _, reach in self._shares.values())])
        room = self._grid.radius + self._grid.pixel
        outside = int((reaches > room).sum())
        if outside:
            raise DataError(
                f"site {self.site}: in {outside} of {len(reaches)} slices the body does not fit the field of view: it "
                f"reaches {reaches.max():.0f} mm from its middle, the scanner sees {self._grid.radius:.0f} mm; enlarge "
                "`geometry.pixel`, or `geometry.size` with `task.size`, and the detector with it",
                detail=", ".join(self._folder.place(p) for p, (_, reach) in self._shares.items() if reach.max() > room),
            )

    def _placed(self, example: SliceExample) -> _Placed:
        def read() -> _Placed:
            image = self._folder.slice(example.patient, example.slice)
            return self._place(image, BodyOutline.of(image))

        return self._cache.get((example.patient, example.slice), read)

    def _place(self, image: Slice, body: BodyOutline) -> _Placed:
        hu = np.where(self._inside, on_grid(image.hu, image.spacing, body.middle, self._grid, AIR), AIR)
        mask = on_grid(body.mask, image.spacing, body.middle, self._grid, 0.0) > 0.5
        return _Placed(np.asarray(hu, dtype=np.float32), np.asarray(mask & self._inside, dtype=np.bool_))


def on_grid(
    image: NDArray[np.generic], spacing: tuple[float, float], middle: tuple[float, float], grid: Grid, outside: float
) -> FloatArray:
    """Resample an image (h, w) to a grid whose centre is the point `middle` (pixel indices): float32 (rows, columns).

    Each value is the mean over a pixel's area, at least one source pixel wide: antialiased when the grid is coarser,
    linear interpolation when it is finer. What the image does not cover is `outside`.
    """
    axes = zip(grid.size, image.shape, spacing, middle, strict=True)
    down, across = (_overlaps(count, grid.pixel, have, step, centre) for count, have, step, centre in axes)
    covered = down.sum(1)[:, None] * across.sum(1)[None]
    mean = down @ image.astype(np.float64) @ across.T
    return np.asarray(mean + (1.0 - covered) * outside, dtype=np.float32)


def _overlaps(count: int, pixel: float, have: int, step: float, centre: float) -> NDArray[np.float64]:
    """Share of each source pixel in each pixel of the grid along one axis: (count, have); rows sum to 1 if covered."""
    width = max(pixel, step)
    middles = (np.arange(count) - (count - 1) / 2)[:, None] * pixel
    sources = (np.arange(have) - centre)[None] * step
    low = np.maximum(middles - width / 2, sources - step / 2)
    high = np.minimum(middles + width / 2, sources + step / 2)
    return np.asarray(np.maximum(high - low, 0.0) / width)


def read_ct_volume(path: Path) -> Volume:
    """Read a NIfTI volume in HU, turned as DICOM shows slices: rows to the back, columns to the left, then to the head.

    Values below -1024 are cut off. Raises DataError, whose message never names the file, as `read_volume` does, where
    the axes are not perpendicular, and where the values are no HU.
    """
    volume = read_volume(path)
    check_axes(volume.affine, str(path))
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.io_orientation(volume.affine), nibabel.orientations.axcodes2ornt(("P", "L", "S"))
    )
    data = np.asarray(nibabel.orientations.apply_orientation(volume.data, turn), dtype=np.float32)
    order = np.argsort(turn[:, 0])
    rows, columns, between = (volume.spacing[int(axis)] for axis in order)
    check_hounsfield(data, path)
    affine = volume.affine @ nibabel.orientations.inv_ornt_aff(turn, volume.data.shape)
    return Volume(np.maximum(data, np.float32(AIR)), (rows, columns, between), affine, volume.space)


def check_axes(affine: NDArray[np.float64], detail: str) -> None:
    """Raises DataError where the axes of a volume are not perpendicular."""
    products = np.abs(affine[:3, :3].T @ affine[:3, :3])
    lengths = np.sqrt(np.diag(products))
    if (np.triu(products, 1) > _SHEAR * np.outer(lengths, lengths)).any():
        raise DataError(
            "a CT volume's axes are not perpendicular, as after a gantry tilt, which is not supported; resample it to "
            "untilted slices first",
            detail=detail,
        )


def slices_of(volume: Volume) -> list[Slice]:
    """The slices (rows, columns) of a volume in HU (rows, columns, slices)."""
    data, spacing = volume.data, (volume.spacing[0], volume.spacing[1])
    return [Slice(np.ascontiguousarray(data[:, :, z]), spacing) for z in range(data.shape[2])]
