"""The released round is chosen among means over the same sites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.federation.rig import Rig
from tests.toys import toy_study
from wardround.federation.exchange import ERROR
from wardround.federation.selection import Scored, best_round, candidates

ALL, TWO, ONE = frozenset("ABC"), frozenset("AB"), frozenset("B")


def scored(*rounds: tuple[int, float, frozenset[str]]) -> list[Scored]:
    return [Scored(*each) for each in rounds]


def test_rounds_are_compared_where_the_same_sites_validated_them() -> None:
    assert best_round([]) is None
    assert best_round(scored((4, 1.0, ALL))) == 4
    assert best_round(scored((1, 25.0, TWO), (2, 25.6, TWO), (3, 26.9, ONE))) == 2
    # The site that left is in a few early means only: what was trained since counts.
    assert best_round(scored((1, 30.0, ALL), (2, 20.0, TWO), (3, 21.0, TWO), (4, 20.5, TWO))) == 3
    # As many of both: over more sites. And the first of equals.
    assert best_round(scored((1, 9.0, TWO), (2, 1.0, ALL), (3, 8.0, TWO), (4, 1.0, ALL))) == 2
    # No two means are over the same sites: the last round is released.
    assert best_round(scored((1, 9.0, ALL), (2, 1.0, TWO), (3, 8.0, ONE))) is None


SITES = st.sampled_from([ALL, TWO, ONE, frozenset("AC")])


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), SITES), max_size=12))
def test_what_may_still_be_released_is_kept(entries: list[tuple[float, frozenset[str]]]) -> None:
    """After every round only candidates are kept: the best in the end is one of them."""
    rounds = [Scored(number, score, sites) for number, (score, sites) in enumerate(entries, start=1)]
    kept: set[int] = set()
    for end in range(1, len(rounds) + 1):
        kept = (kept | {end}) & candidates(rounds[:end])
    chosen = best_round(rounds)
    assert chosen is None or chosen in kept


def test_a_site_that_drops_out_does_not_choose_the_round(tmp_path: Path) -> None:
    """Without its hardest site a validation looks better than it is."""
    study = toy_study(schedule={"rounds": 6, "min_sites": 2, "keep": 1})
    rig = Rig(study, tmp_path)
    honest = rig.sites["C"].handle

    def away(request: Any) -> Any:
        if request.header.round == 4:
            return request.reply(ERROR, meta={"reason": "away"})
        return honest(request)

    rig.sites["C"].handle = away  # type: ignore[method-assign]
    # Whatever C has to say of a model, it makes the mean worse.
    for name, site in rig.sites.items():
        evaluate, worse = site.learner.held_out.evaluate, -50.0 if name == "C" else 0.0
        site.learner.held_out.evaluate = lambda split, evaluate=evaluate, worse=worse: {  # type: ignore[method-assign]
            metric: values + (worse if metric == "r" else 0.0) for metric, values in evaluate(split).items()
        }
    rig.train()
    reports = {report.round: report for report in rig.journal.reports()}
    # The model of round 3 was validated in round 4, where C was away.
    assert reports[3].validated == ("A", "B")
    assert all(reports[n].validated == ("A", "B", "C") for n in (1, 2, 4, 5, 6))
    means = {n: report.validation["r"] for n, report in reports.items() if report.validation}
    assert max(means, key=lambda n: means[n]) == 3
    released = rig.coordinator.release()
    assert released.number == max((n for n in means if n != 3), key=lambda n: means[n])
    assert reports[3].to_json()["validated"] == ("A", "B")
