"""A site's privacy: its privacy budget, what a study would cost its patients, and what was spent."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from wardround.federation.facts import SiteSpending
from wardround.learning.private_training import training_patients
from wardround.plan.arms import Arm
from wardround.protection.accounting import Spending, epsilon_of
from wardround.protection.lattice import Lattice
from wardround.protection.ledger import Ledger, peek
from wardround.protection.privacy import PrivacyBudget, Terms, spent, terms_of
from wardround.protection.secret import SecretRoot
from wardround.storage.cipher import StoreCipher
from wardround.storage.store import SiteStore
from wardround.study.protection import Privacy
from wardround.study.schema import Study
from wardround.study.sites import SitesFile
from wardround.tasks.task import Dataset


@dataclass(frozen=True)
class Outlook:
    """What a study would cost a site's patients: alone (`planned`), and on top of what a ledger holds (`spent`).

    `lasts` of the `rounds` fit the budget, when all arms go on side by side.
    """

    site: str
    patients: int
    terms: Terms
    planned: float
    spent: float | None
    lasts: int
    rounds: int


class PrivacyBudgets:
    """The privacy budget of every site of a run, opened when it is first needed and shared by all arms."""

    def __init__(
        self,
        study: Study,
        sites: SitesFile,
        out: Path,
        arms: Mapping[str, Arm],
        lattice: Callable[[], Lattice | None],
    ) -> None:
        self._study = study
        self._sites = sites
        self._out = out
        self._arms = arms
        self._lattice = lattice
        self._budgets: dict[str, PrivacyBudget] = {}
        self._stores: list[SiteStore] = []

    @property
    def rules(self) -> Privacy | None:
        """What the study asks for."""
        return self._study.protection.privacy

    def terms(self, site: str, dataset: Dataset, patients: int | None = None) -> Terms:
        """The terms of a site: every arm in which it trains spends of the same budget. Raises `StudyError`.

        `patients` is how many trained when the run began, where some withdrew since: the rate at which each is drawn,
        and with it noise and cost, stay what they were.
        """
        assert self.rules is not None
        steps = self._study.schedule.rounds * self._steps(site)
        return terms_of(self.rules, site, patients or training_patients(dataset), steps, self._lattice())

    def outlook(self, site: str, dataset: Dataset) -> Outlook:
        """What the study would cost, found without writing anything.

        Raises `StudyError`, and `JournalError` for a ledger whose chain is broken.
        """
        terms, path, rounds = self.terms(site, dataset), self._sites.of(site).ledger, self._study.schedule.rounds
        before = () if path is None else tuple(entry.spending for entry in peek(path))

        def after(count: int, *earlier: Spending) -> float:
            return epsilon_of((*earlier, terms.spending(count * self._steps(site))), terms.delta, terms.accountant)

        # The most rounds that fit: the budget is passed at some number, and at every larger one.
        lasts = bisect_right(range(1, rounds), terms.epsilon, key=lambda count: after(count, *before))
        return Outlook(
            site=site,
            patients=training_patients(dataset),
            terms=terms,
            planned=after(rounds),
            spent=None if path is None else epsilon_of(before, terms.delta, terms.accountant),
            lasts=rounds if after(rounds, *before) <= terms.epsilon else lasts,
            rounds=rounds,
        )

    def _steps(self, site: str) -> int:
        """A site's steps in a round of all arms."""
        return sum(arm.local.steps for arm in self._arms.values() if site in arm.sites)

    def of(self, site: str, dataset: Dataset, patients: int | None = None) -> PrivacyBudget:
        """A site's privacy budget; its ledger is where the sites file says, or beside the site's stores.

        `patients` as in `terms`.
        """
        if site not in self._budgets:
            store = SiteStore(self._out / "work" / "sites" / site / "privacy", StoreCipher.of(self._sites.key(site)))
            self._stores.append(store)
            path = self._sites.of(site).ledger or self._out / "work" / "sites" / site / "ledger.jsonl"
            self._budgets[site] = PrivacyBudget(
                site, self.terms(site, dataset, patients), Ledger(path, store), SecretRoot.of(store)
            )
        return self._budgets[site]

    def close(self) -> None:
        """Close the stores behind the privacy budgets; whoever asks for one again opens it again."""
        self._budgets.clear()
        while self._stores:
            self._stores.pop().close()


def spending_of(budget: PrivacyBudget, study: str) -> SiteSpending:
    """What a privacy budget has paid, of the study with that hash and of all."""
    entries, terms = budget.ledger.entries(), budget.terms
    return SiteSpending(
        epsilon=round(spent(entries, terms.delta, terms.accountant, study), 4),
        epsilon_ledger=round(spent(entries, terms.delta, terms.accountant), 4),
        delta=terms.delta,
        steps=sum(entry.steps for entry in entries if entry.study == study),
        noise_multiplier=terms.noise,
        sample_rate=terms.rate,
        # A ledger may hold rounds of another study, whose noise was shared.
        shared=any(entry.rho > 0.0 for entry in entries),
    )
