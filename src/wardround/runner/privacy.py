"""Privacy of a run on this machine: each site's purse, and what result.json says was spent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wardround.federation.private_training import training_patients
from wardround.federation.store import SiteStore
from wardround.federation.vault import Vault
from wardround.protection.ledger import Ledger
from wardround.protection.privacy import Purse, Terms, spent, terms_of
from wardround.protection.secret import SecretRoot
from wardround.runner.arms import Arm
from wardround.study.protection import Privacy
from wardround.study.schema import Study
from wardround.study.sites import SitesFile
from wardround.tasks.task import Dataset

WORDS = {
    "reconstruction-guard": "Noise against reading images out of updates. An epsilon this large promises nothing "
    "against other attacks, such as telling whether somebody was a patient.",
    "moderate": "A budget at which published imaging models keep most of their use; somebody who knows all other "
    "patients may still learn something of one.",
    "strict": "A small budget; expect to lose accuracy unless the site has thousands of patients.",
}
SCOPE = (
    "For training patients of each site, under adding or removing one: the models of all arms and rounds together. "
    "The number of a site's training patients is taken as public. Metrics of validation and test patients leave as "
    "sums without noise."
)


class Purses:
    """The purse of every site of a run, opened when it is first needed and shared by all arms."""

    def __init__(self, study: Study, sites: SitesFile, out: Path, arms: Mapping[str, Arm]) -> None:
        self._study = study
        self._sites = sites
        self._out = out
        self._arms = arms
        self._purses: dict[str, Purse] = {}

    @property
    def rules(self) -> Privacy | None:
        """What the study asks for."""
        return self._study.protection.privacy

    def terms(self, site: str, dataset: Dataset) -> Terms:
        """The terms of a site: every arm in which it trains spends of the same budget. Raises `StudyError`."""
        assert self.rules is not None
        rounds = self._study.schedule.rounds
        steps = sum(rounds * arm.local.steps for arm in self._arms.values() if site in arm.sites)
        return terms_of(self.rules, site, training_patients(dataset), steps)

    def of(self, site: str, dataset: Dataset) -> Purse:
        """A site's purse; its ledger is where the sites file says, or beside the site's stores."""
        if site not in self._purses:
            store = SiteStore(self._out / "work" / "sites" / site / "privacy", Vault.of(self._sites.key(site)))
            path = self._sites.of(site).ledger or self._out / "work" / "sites" / site / "ledger.jsonl"
            self._purses[site] = Purse(site, self.terms(site, dataset), Ledger(path, store), SecretRoot.of(store))
        return self._purses[site]


def statement(study: Study, study_sha256: str, purses: Iterator[tuple[str, Purse]]) -> dict[str, Any] | None:
    """`privacy` of result.json: nothing where updates were neither noised nor summed under masks."""
    rules, secure = study.protection.privacy, study.protection.secure
    if rules is None:
        return {"secure": True, "unit": None, "epsilon": None} if secure else None
    sites = {site: _site(purse, study_sha256) for site, purse in purses}
    return {
        "secure": secure,
        "unit": "patient",
        "preset": rules.preset,
        "epsilon": max((entry["epsilon"] for entry in sites.values()), default=0.0),
        "budget": rules.budget,
        "accountant": rules.accountant,
        "sites": sites,
        "note": f"{_words(rules)} {SCOPE}",
    }


def _words(rules: Privacy) -> str:
    if rules.epsilon is not None or rules.noise_multiplier is not None:
        return "The study's own choice of budget or noise; what it promises is the epsilon of each site."
    return WORDS[rules.preset]


def _site(purse: Purse, study: str) -> dict[str, Any]:
    entries, terms = purse.ledger.entries(), purse.terms
    return {
        "epsilon": round(spent(entries, terms.delta, terms.accountant, study), 4),
        "epsilon_ledger": round(spent(entries, terms.delta, terms.accountant), 4),
        "delta": terms.delta,
        "steps": sum(entry.steps for entry in entries if entry.study == study),
        "noise_multiplier": terms.noise,
        "sample_rate": terms.rate,
    }
