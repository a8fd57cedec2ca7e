"""What `check` says of phase, references and varied training scans."""

from __future__ import annotations

from typing import Any

from wardround.runs.explain_mri import explain_scanners
from wardround.study.load import load_study


def _said(**changes: Any) -> str:
    study = load_study({"name": "trial", "sites": {"A": {}, "B": {}, "C": {"role": "unseen"}}, **changes})
    return " ".join(explain_scanners(study).split())


def test_the_real_image_constraint_is_explained_where_it_is_set_and_where_it_is_not() -> None:
    real, free = _said(model={"preset": "small"}), _said()
    assert "images real: the network takes the phase from coil maps" in real
    assert "becomes an error. For real scanners set model.image: complex" in real
    assert "images complex: nothing is assumed of the phase." in free
    assert "references" not in free
    assert "varied" not in free


def test_raw_data_and_trajectories_are_explained_too() -> None:
    for kind in ("mri_raw", "mri_noncartesian"):
        assert "images real: " in _said(acquisition={"kind": kind}, model={"preset": "small"})
    free = _said(acquisition={"kind": "mri_raw"}, model={"kind": "cascade"})
    assert free.endswith("images complex: nothing is assumed of the phase")


def test_what_varies_is_listed_with_the_sites_that_train() -> None:
    vary = {"acceleration": [2, 5], "families": ["random", "equispaced"], "turns": True, "bias": 0.4}
    said = _said(acquisition={"reference": "scan", "vary": vary})
    assert "at A, B, C the scan with all lines and its noise" in said
    assert "training scans at A, B are drawn anew, others are as the scanner says: " in said
    assert said.endswith("acceleration 2 to 5, families random or equispaced, turns in quarters, bias up to 0.4")
