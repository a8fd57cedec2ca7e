"""Under a secure sum, local arms are trained inside their sites; killed there, a run ends with the same models."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.killed import ROUNDS, SITES, Undisturbed, Whole, alone_acts


@pytest.fixture
def whole(undisturbed: Undisturbed) -> Whole:
    """An uninterrupted run whose local arms stay inside; its models are three, and its logs hold."""
    whole = undisturbed["inside"]
    assert len(set(whole.facts["models"].values())) == len(SITES)
    assert whole.facts["damages"] == []
    return whole


def _training(whole: Whole, site: str) -> range:
    """The acts of a site's local arm, from its first training to the next site's."""
    acts = alone_acts(whole.heard)
    begun = [act for act in acts if whole.heard[act - 1] == "before train"][::ROUNDS]
    return range(*[*begun, acts.stop][SITES.index(site) : SITES.index(site) + 2])


@pytest.mark.slow
def test_killed_while_a_site_trains_alone(whole: Whole, tmp_path: Path) -> None:
    """In the second site's arm, where a round is about to be kept: one arm is done, one begun and one untouched."""
    commits = [act for act in _training(whole, "B") if whole.heard[act - 1] == "before commit"]
    # New keys in every run move its acts by a few now and then: what it died at is not asked.
    whole.killed(tmp_path / "out", commits[len(commits) // 2])
    models = tmp_path / "out" / "models"
    assert [(models / site / f"local-{site}" / "model.safetensors").exists() for site in SITES] == [True, False, False]
    whole.resume(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_act_of_a_local_arm(whole: Whole, tmp_path: Path, seed: int) -> None:
    """Four moments, each in another quarter of what follows the federation: training, writing the model, testing."""
    acts, parts, chance = alone_acts(whole.heard), 4, random.Random(seed)
    for part in range(parts):
        fatal = chance.choice(acts[part * len(acts) // parts : (part + 1) * len(acts) // parts])
        out = tmp_path / f"killed-at-{fatal}"
        whole.killed(out, fatal)
        whole.resume(out)


@pytest.mark.slow
def test_a_local_arm_killed_again_and_again(whole: Whole, tmp_path: Path) -> None:
    """After the first kill each life is a little longer than the one before: it gets on, one shred at a time."""
    out, acts = tmp_path / "out", alone_acts(whole.heard)
    whole.killed(out, acts.start + 1)
    lives = 1
    while (victim := whole.start(out, fatal=len(acts) // 3 + lives * len(acts) // 20)).wait():
        lives += 1
        assert lives < 20
    assert lives >= 3
    whole.assert_same(out, victim.said)
