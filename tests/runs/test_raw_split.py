"""Files that a scanner undersampled and that hold no true image train a network all the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.raw_files import SIZE, coil_images, write_fastmri
from tests.runs.test_raw_run import LINES, settings
from wardround.errors import StudyError
from wardround.runs.session import run
from wardround.study.load import load_study


@pytest.mark.slow
def test_files_without_true_images_train_beside_full_scans(tmp_path: Path) -> None:
    kept = np.zeros(SIZE)
    kept[LINES] = 1
    for number in range(3):
        own = coil_images(number, 1)
        write_fastmri(
            tmp_path / "data" / "Alpha" / f"{number}.h5", own, mask=kept, reference=False, patient=f"P{number}"
        )
        write_fastmri(tmp_path / "data" / "Beta" / f"{number}.h5", coil_images(9 + number, 1), patient=f"P{number}")
    undersampled = {"kind": "mri_raw", "sampling": "own", "reference": "none"}
    study, sites = settings(tmp_path / "data", schedule={"rounds": 2})
    study["sites"]["Alpha"] = {"acquisition": undersampled}
    with pytest.raises(StudyError, match=r"the raw data of site Alpha come without true images"):
        load_study(study)
    study["sites"]["Alpha"]["supervision"] = {"kind": "split"}
    (tmp_path / "sites.yaml").write_text(yaml.safe_dump(sites), encoding="utf-8")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    found = run(tmp_path / "study.yaml", tmp_path / "sites.yaml", tmp_path / "out", engine="local", quiet=True)
    rows = found.metrics["federated"]
    alpha, beta = rows["Alpha"], rows["Beta"]
    assert alpha is not None
    assert beta is not None
    assert alpha["psnr"] is None
    assert beta["psnr"] is not None
    assert found.metric("federated", "Alpha", "kspace_residual") > 0.0
    assert found.metric("federated", "Beta", "kspace_residual") > 0.0
