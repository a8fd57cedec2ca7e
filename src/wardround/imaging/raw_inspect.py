"""What files and folders of raw data hold, for people, and a study proposed for them. Nothing here names a patient."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from wardround.errors import DataError
from wardround.imaging.readers.raw import RawSlices, is_raw, open_raw, raw_files
from wardround.imaging.readers.raw.folder import RawFolder, patient_of
from wardround.imaging.readers.raw.slices import fully_sampled
from wardround.imaging.readers.volume import FloatArray

_SHOWN = 4


@dataclass(frozen=True)
class RawSummary:
    """One site's raw data in numbers: patients, files by kind, sizes (H, W) of slices, coils, how many are full scans.

    `along` are the sizes of images of radial and spiral scans, which are in none of `sizes` and no full scans.
    `references` counts files with a reference image; `problems` are the files that cannot be used, by the reason.
    """

    name: str
    patients: int
    kinds: Mapping[str, int]
    sizes: Mapping[tuple[int, int], int]
    coils: Mapping[int, int]
    slices: int
    full: int
    references: int
    scanners: Mapping[str, int]
    problems: Mapping[str, tuple[Path, ...]]
    along: Mapping[tuple[int, int], int] = field(default_factory=dict)

    @property
    def files(self) -> int:
        """Number of files that can be read."""
        return sum(self.kinds.values())

    def lines(self) -> list[str]:
        """Return the summary for people."""
        shown = [f"{h} x {w} ({count})" for (h, w), count in list(self.sizes.items())[:_SHOWN]]
        shown += [f"{h} x {w} along a trajectory ({count})" for (h, w), count in list(self.along.items())[:_SHOWN]]
        sizes = ", ".join(shown)
        coils = ", ".join(f"{number} ({count})" for number, count in self.coils.items())
        kinds = ", ".join(f"{kind} ({count})" for kind, count in self.kinds.items())
        people = "1 patient" if self.patients == 1 else f"{self.patients} patients"
        scanners = (
            f"; {', '.join(f'{name} ({count})' for name, count in self.scanners.items())}" if self.scanners else ""
        )
        return [
            f"site {self.name}: {people} with raw data: {kinds or 'none that can be read'}",
            f"  {self.slices} slices of {sizes or 'unknown size'}; coils {coils or 'unknown'}{scanners}",
            f"  {self.full} of {self.files} files fully sampled, {self.references} with a reference image",
            *(f"  problem: {text} ({counted_files(len(files))})" for text, files in self.problems.items()),
        ]


def raw_sites(root: Path) -> list[Path]:
    """The folders of sites with raw data in `root`, or `root` itself where it is one.

    `root` is a site where raw data lie in it, beside each other, or where each folder in it holds one patient: a file,
    or files whose headers name one patient. Else its folders with raw data are the sites. Empty where there are none.
    """
    if not root.is_dir():
        return []
    entries = [entry for entry in sorted(root.iterdir()) if not entry.name.startswith(".")]
    if any(is_raw(entry) and not entry.is_dir() for entry in entries):
        return [root]
    folders = [entry for entry in entries if entry.is_dir() and raw_files(entry)]
    return folders if any(_several(folder) for folder in folders) else [root] if folders else []


def _several(folder: Path) -> bool:
    """Whether a folder holds several patients: folders of them, or files that are not all of one."""
    inner = [entry for entry in folder.iterdir() if entry.is_dir() and raw_files(entry)]
    files = [entry for entry in folder.iterdir() if is_raw(entry) and not entry.is_dir()]
    return len(inner) + len({patient_of(path) or path.name for path in files}) > 1


def summarise_raw(path: Path) -> RawSummary:
    """Look at every file of a site; one slice of each is read. Raises DataError for a folder that is no site."""
    folder = RawFolder(path, path.resolve().name)
    kinds: Counter[str] = Counter()
    sizes: Counter[tuple[int, int]] = Counter()
    along: Counter[tuple[int, int]] = Counter()
    coils: Counter[int] = Counter()
    scanners: Counter[str] = Counter()
    problems: defaultdict[str, list[Path]] = defaultdict(list)
    slices = full = references = 0
    for file in (file for patient in range(len(folder)) for file in folder.files(patient)):
        try:
            scan = open_raw(file)
            mask = _mask(scan, len(scan) // 2)
        except DataError as error:
            problems[str(error)].append(file)
            continue
        kinds[scan.kind] += 1
        coils[scan.coils] += 1
        (sizes if scan.cartesian else along)[scan.size] += 1
        slices += len(scan)
        full += mask is not None and fully_sampled(mask)
        references += scan.picture is not None
        scanners.update([said] if (said := scanner_of(scan)) else [])
    return RawSummary(
        path.resolve().name,
        len(folder),
        dict(kinds.most_common()),
        dict(sizes.most_common()),
        dict(sorted(coils.items())),
        slices,
        full,
        references,
        dict(scanners.most_common(_SHOWN)),
        {text: tuple(files) for text, files in sorted(problems.items(), key=lambda item: -len(item[1]))},
        dict(along.most_common()),
    )


def counted_files(count: int) -> str:
    """A number of files, for people."""
    return "1 file" if count == 1 else f"{count} files"


def scanner_of(scan: RawSlices) -> str:
    """Vendor and field strength, as far as a header says them."""
    strength = scan.facts.field_strength
    parts = (scan.facts.vendor, None if strength is None else f"{strength:.2g} T")
    return " ".join(part for part in parts if part)


def describe_file(path: Path) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """What a file of raw data is, facts of it, and problems; all slices are read."""
    try:
        scan = open_raw(path)
        masks = [_mask(scan, number) for number in range(len(scan))]
    except DataError as error:
        return "raw data", (), (str(error),)
    slices, coils, height, width = scan.shape
    what = f"{height} x {width} samples" if scan.cartesian else f"{height} readouts of {width} samples"
    facts = [f"{scan.kind}: {slices} slice{'s' if slices != 1 else ''} of {what}, {coils} coils"]
    if not scan.cartesian:
        facts.append(f"an image has {scan.size[0]} x {scan.size[1]} pixels by the trajectory or its header")
    if all(mask is not None and fully_sampled(mask) for mask in masks):
        facts.append("fully sampled")
    elif (middle := masks[len(masks) // 2]) is not None:
        facts.append(f"undersampled: {middle.mean():.1%} of a slice measured")
    if scan.facts.spacing is not None:
        facts.append("voxels of " + " x ".join(f"{side:.3g}" for side in scan.facts.spacing) + " mm")
    if said := scanner_of(scan):
        facts.append(said)
    if scan.noise is not None:
        facts.append(f"noise scan of {scan.noise.shape[1]} samples, used for pre-whitening")
    if scan.picture is not None:
        facts.append("with a reference image")
    return "raw data of MRI", tuple(facts), ()


def _mask(scan: RawSlices, number: int) -> FloatArray | None:
    """Where a slice was measured; None along a trajectory. Raises DataError where the slice cannot be used."""
    kspace = scan.kspace(number)
    if scan.trajectory is None:
        return scan.mask(number, kspace)
    scan.trajectory(number)
    return None
