"""The lines at `>>>` in public docstrings run as they stand, one after the other, beside two small hospitals."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import pytest

from tests.mri_hospitals import head, make_hospitals, save, write_study
from wardround.results import files, schema
from wardround.runs import predict, reconstruct, session
from wardround.study import load, sites

# In this order: a later one reads what `run` wrote.
DOCUMENTED = (load, sites, session, files, schema, reconstruct, predict)
STUDY: dict[str, Any] = {
    "schedule": {"rounds": 1},
    "local": {"steps": 1},
    "task": {
        "contrasts": ["flair"],
        "size": [64, 64],
        "evaluation": {"tuning_slices": 1, "slices": {"per_patient": 1}, "baselines": ["zero_filled"]},
    },
}


def test_what_docstrings_show_is_what_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_study(tmp_path, make_hospitals(tmp_path / "data"), **STUDY)
    save(head(3), tmp_path / "scan.nii.gz")
    monkeypatch.chdir(tmp_path)
    for module in DOCUMENTED:
        # In the order of the file: what `run` writes, `evaluate` reads.
        shown = doctest.DocTestFinder().find(module, extraglobs={"read_result": files.read_result})
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL)
        for one in sorted(shown, key=lambda test: test.lineno or 0):
            runner.run(one)
        assert runner.tries > 0, module.__name__
        assert runner.failures == 0, module.__name__
