"""The demo leaves a sites file, so that the other commands work on its run."""

from __future__ import annotations

from pathlib import Path

from wardround.physics.phantoms import DEMO_SITES
from wardround.runner.demo import demo_study
from wardround.study.sites import load_sites


def test_the_demo_leaves_a_sites_file(tmp_path: Path) -> None:
    """It lies beside the phantoms and names them relative to itself: the run's folder can be moved."""
    made = tmp_path / "made"
    for site in DEMO_SITES:
        (made / site.name).mkdir(parents=True)
        (made / site.name / ".complete").touch()
    study, sites = demo_study(made, [])
    assert sites == load_sites(made / "sites.yaml")
    assert sites.sites.keys() == study.sites.keys()
    moved = made.rename(tmp_path / "moved")
    assert load_sites(moved / "sites.yaml").of("Harbour").data == (moved.resolve() / "Harbour",)
