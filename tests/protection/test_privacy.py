"""Accounting against known numbers, the ledger, and the secret randomness."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tests.protection.spender import anything, entry, spend_many
from wardround.errors import JournalError, MissingExtra, StudyError
from wardround.protection.accounting import Spending, epsilon_of, noise_for
from wardround.protection.ledger import Ledger
from wardround.protection.opacus import from_opacus
from wardround.protection.privacy import BudgetSpent, PrivacyBudget, Terms, terms_of
from wardround.protection.secret import SecretRoot, SecretStream, coin
from wardround.storage.store import SiteStore
from wardround.study.protection import Privacy


@pytest.mark.parametrize(
    ("patients", "batch", "epochs", "noise", "known"),
    [(500, 32, 50, 1.0, 10.7), (5000, 64, 50, 1.0, 4.7), (5000, 64, 50, 0.7, 10.8), (50_000, 256, 20, 0.7, 4.8)],
)
def test_known_budgets(patients: int, batch: int, epochs: int, noise: float, known: float) -> None:
    spending = Spending(noise, batch / patients, epochs * patients // batch)
    assert epsilon_of([spending], 1 / (10 * patients)) == pytest.approx(known, abs=0.051)


def test_two_accountants_agree_within_a_percent() -> None:
    spendings = [Spending(1.0, 32 / 500, 500), Spending(1.5, 32 / 500, 281)]
    assert epsilon_of(spendings, 1e-4, "prv") == pytest.approx(epsilon_of(spendings, 1e-4), rel=0.01)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        pytest.param("opacus", "GradSampleModule", marks=pytest.mark.slow),
        pytest.param("opacus.accountants", "PRVAccountant", marks=pytest.mark.slow),
    ],
)
def test_importing_opacus_leaves_the_root_logger_alone(module: str, name: str) -> None:
    """In a process of its own: Opacus sets up logging when it is imported, and that happens once."""
    program = (
        "import logging, sys\n"
        "from wardround.protection.opacus import from_opacus\n"
        "assert 'opacus' not in sys.modules\n"
        "root = logging.getLogger()\n"
        "before = (list(root.handlers), root.level)\n"
        f"from_opacus({module!r}, {name!r}, 'this test')\n"
        "assert 'opacus' in sys.modules\n"
        "assert (list(root.handlers), root.level) == before, root.handlers\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_without_opacus_the_extra_is_named() -> None:
    with pytest.raises(MissingExtra, match=r"this test needs .*wardround\[privacy\]"):
        from_opacus("opacus.no_such_part", "anything", "this test")


def test_one_gaussian_step_of_everybody_costs_what_the_formula_says() -> None:
    """Balle & Wang (ICML 2018), equation 6: delta(eps) = Phi(1/2s - eps s) - e^eps Phi(-1/2s - eps s)."""
    noise, delta = 2.0, 1e-4
    epsilon = epsilon_of([Spending(noise, 1.0, 1)], delta)
    half = 1 / (2 * noise)
    found = stats.norm.cdf(half - epsilon * noise) - np.exp(epsilon) * stats.norm.cdf(-half - epsilon * noise)
    assert found == pytest.approx(delta, rel=0.01)


def test_steps_compose_over_rounds() -> None:
    apart = epsilon_of([Spending(1.0, 0.1, 5)] * 4, 1e-3)
    assert apart == epsilon_of([Spending(1.0, 0.1, 20)], 1e-3)
    assert apart > epsilon_of([Spending(1.0, 0.1, 5)], 1e-3) > 0 == epsilon_of([], 1e-3)


@pytest.mark.slow
def test_noise_is_the_least_that_fits() -> None:
    noise = noise_for(3.0, 1e-3, 0.1, 100)
    assert 2.95 < epsilon_of([Spending(noise, 0.1, 100)], 1e-3) <= 3.0
    assert epsilon_of([Spending(noise * 0.99, 0.1, 100)], 1e-3) > 3.0


@pytest.mark.slow
def test_terms() -> None:
    terms = terms_of(Privacy(preset="strict", patients_per_step=5), "A", 50, 100)
    assert (terms.delta, terms.rate, terms.epsilon) == (1 / 500, 0.1, 3.0)
    with pytest.raises(StudyError, match="patients_per_step=5 but site A has 4"):
        terms_of(Privacy(patients_per_step=5), "A", 4, 100)
    with pytest.raises(StudyError, match=r"delta=0\.02.*less than 0\.02"):
        terms_of(Privacy(patients_per_step=5, delta=0.02), "A", 50, 100)
    guard = terms_of(Privacy(preset="reconstruction-guard"), "A", 60, 400)
    assert guard.noise == 0.3
    assert epsilon_of([Spending(guard.noise, guard.rate, 400)], guard.delta) > 100


# Secret randomness --------------------------------------------------------------------------------------------------


def test_noise_is_standard_normal() -> None:
    drawn = SecretStream(b"k" * 32).normals(300_000)
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    assert abs(drawn.mean()) < 5 / np.sqrt(300_000)
    assert drawn.var() == pytest.approx(1.0, abs=5 * np.sqrt(2 / 300_000))
    assert stats.kurtosis(drawn) == pytest.approx(0.0, abs=5 * np.sqrt(24 / 300_000))


KEYS = [SecretRoot(b"r" * 32).key(0, "sampling", patient) for patient in range(10_000)]


@settings(deadline=None)
@given(rate=st.floats(0.01, 1.0))
def test_poisson_rate(rate: float) -> None:
    chosen = np.array([coin(key, rate) for key in KEYS])
    assert abs(chosen.mean() - rate) <= 5.5 * np.sqrt(rate * (1 - rate) / len(KEYS))


def test_streams_differ_by_root_and_purpose(tmp_path: Path) -> None:
    root, other = (SecretRoot.of(SiteStore(tmp_path / name)) for name in "ab")
    assert root.key(1, "noise") != other.key(1, "noise")
    assert root.key(1, "noise") != root.key(1, "sampling") != root.key(2, "sampling")
    assert SecretRoot.of(SiteStore(tmp_path / "a")).key(1) == root.key(1), "the root must survive a restart"


# The ledger -----------------------------------------------------------------------------------------------------------


def _filled(folder: Path, count: int = 3) -> Ledger:
    ledger = Ledger(folder / "ledger.jsonl", SiteStore(folder / "store"))
    for number in range(count):
        assert ledger.spend(entry(number), anything)
    return ledger


def test_ledger_holds_what_was_spent_once(tmp_path: Path) -> None:
    ledger = _filled(tmp_path)
    assert not ledger.spend(entry(1), anything), "the same bytes cost nothing twice"
    assert [entry.round for entry in Ledger(ledger.path, SiteStore(tmp_path / "store")).entries()] == [0, 1, 2]


@pytest.mark.parametrize("harm", ["lost", "emptied", "cut", "edited", "other"])
def test_ledger_that_was_lost_or_changed_is_refused(tmp_path: Path, harm: str) -> None:
    ledger = _filled(tmp_path)
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    match harm:
        case "lost":
            ledger.path.unlink()
        case "emptied":
            ledger.path.write_bytes(b"")
        case "cut":
            ledger.path.write_bytes(b"".join(lines[:2]))
        case "edited":
            ledger.path.write_bytes(lines[0] + lines[1].replace(b'"steps": 10', b'"steps": 1') + lines[2])
        case "other":
            another = Ledger(tmp_path / "another.jsonl", SiteStore(tmp_path / "another"))
            for number in range(4):
                another.spend(entry(number, "t"), anything)
            ledger.path.write_bytes(another.path.read_bytes())
    with pytest.raises(JournalError, match=r"privacy ledger was (lost|changed)"):
        ledger.spend(entry(9), anything)


def test_ledger_forgets_a_torn_line_and_goes_on(tmp_path: Path) -> None:
    ledger = _filled(tmp_path)
    with ledger.path.open("ab") as file:
        file.write(b'{"study": "s", "ar')
    assert ledger.spend(entry(3), anything)
    assert [entry.round for entry in ledger.entries()] == [0, 1, 2, 3]


def test_ledger_ahead_of_its_anchor_goes_on(tmp_path: Path) -> None:
    """A process died between the two writes, or another study wrote: what the ledger says counts."""
    first = _filled(tmp_path)
    second = Ledger(first.path, SiteStore(tmp_path / "another store"))
    assert second.spend(entry(0, "t"), anything)
    assert len(first.entries()) == 4


def test_ledger_of_two_processes_at_once(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("spawn")
    both = [fork.Process(target=spend_many, args=(tmp_path, who)) for who in "st"]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert len(Ledger(tmp_path / "ledger.jsonl", SiteStore(tmp_path / "store")).entries()) == 10


def _budget(folder: Path, epsilon: float = 3.0) -> PrivacyBudget:
    store = SiteStore(folder / "store")
    terms = Terms(epsilon, 1e-3, 1.0, 1.0, 0.1, 5.0, 2, "exact", "pld")
    return PrivacyBudget("A", terms, Ledger(folder / "ledger.jsonl", store), SecretRoot.of(store))


def test_budget_is_never_passed_and_spans_studies(tmp_path: Path) -> None:
    budget = _budget(tmp_path)

    def pay(number: int) -> None:
        budget.pay(f"study {number % 2}", "federated", number, 10, "cohort", ["model"])

    with suppress(BudgetSpent):
        for number in range(50):
            pay(number)
    with pytest.raises(BudgetSpent, match=r"site A stops training.*budget is 3 "):
        pay(50)
    spendings = [entry.spending for entry in budget.ledger.entries()]
    assert len(spendings) > 1
    assert epsilon_of(spendings, 1e-3) <= 3.0 < epsilon_of([*spendings, spendings[0]], 1e-3)


def test_the_same_inputs_give_the_same_noise_and_others_other(tmp_path: Path) -> None:
    budget = _budget(tmp_path, 8.0)
    one, same, other = (budget.pay("s", "a", 1, 5, "cohort", [inputs]) for inputs in ("x", "x", "y"))
    draw = [secret.noise(0).normals(4).tolist() for secret in (one, same, other)]
    assert draw[0] == draw[1] != draw[2]
    assert len(budget.ledger.entries()) == 2
    assert json.loads(budget.ledger.path.read_text().splitlines()[0])["cohort"] == "cohort"
