"""CT slices in DICOM as volumes in HU with a mask of the lungs, for luad-chain.yaml: a threshold, and no ground truth.

    python examples/luad_lungs.py ${WARDROUND_DATA}/luad-ct lungs

A site is a folder of patients with one slice or several in DICOM, as luad-sites.yaml has them. The mask is what is
thinner than -400 HU inside the body, in pieces of at least 2 cm2, with its holes: no doctor looked at it, the airways
are in it, dense lung and tumours at its edge are not. A network that learns it shows that a chain works, and nothing of
lungs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from wardround.imaging.datasets.ct import BodyOutline, CTFolder, Slice

THIN, LEAST = -400.0, 200.0  # HU, mm2
THICKNESS = 5.0  # mm, where slices lie alone: only for the header


def lungs(image: Slice) -> NDArray[np.uint8]:
    """1 where a slice shows lung or another hollow: (rows, columns)."""
    thin = (image.hu < THIN) & BodyOutline.of(image).mask
    pieces, _ = ndimage.label(thin)
    areas = np.bincount(pieces.ravel()) * image.spacing[0] * image.spacing[1]
    large = areas >= LEAST
    large[0] = False
    return np.asarray(ndimage.binary_fill_holes(large[pieces]), np.uint8)


def convert(source: Path, out: Path) -> int:
    """Write every slice of a site as `PATIENT/ct_NUMBER.nii.gz` and `lung_NUMBER.nii.gz`; returns how many."""
    folder, count = CTFolder(source, source.name), 0
    for patient in range(len(folder)):
        for number, image in enumerate(folder.slices(patient)):
            rows, columns = image.spacing
            # Rows go to the back and columns to the left, which is -y and -x in RAS.
            affine = np.array([[0, -columns, 0, 0], [-rows, 0, 0, 0], [0, 0, THICKNESS, 0], [0, 0, 0, 1.0]])
            to = out / source.name / folder.name(patient)
            to.mkdir(parents=True, exist_ok=True)
            for name, values in (("ct", np.rint(image.hu).astype(np.int16)), ("lung", lungs(image))):
                nibabel.save(nibabel.Nifti1Image(values[..., None], affine), to / f"{name}_{number}.nii.gz")
            count += 1
    return count


if __name__ == "__main__":
    given, written = Path(sys.argv[1]), Path(sys.argv[2])
    for site in sorted(path for path in given.iterdir() if path.is_dir()):
        print(f"{site.name}: {convert(site, written)} slices")
