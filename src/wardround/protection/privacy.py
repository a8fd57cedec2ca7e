"""Patient-level differential privacy of one site: its terms, its budget, and the key to a round's noise. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from wardround.errors import StudyError, WardroundError
from wardround.protection.accounting import Accountant, Spending, epsilon_of, noise_for
from wardround.protection.lattice import Lattice
from wardround.protection.ledger import Charge, Ledger
from wardround.protection.secret import SecretRoot, SecretStream, coin
from wardround.study.protection import Gradients, Privacy
from wardround.wire.canonical import canonical_json


class BudgetSpent(WardroundError):
    """A site's privacy budget does not allow the next round."""


@dataclass(frozen=True)
class Terms:
    """What a site agreed to: everything that its guarantee depends on.

    `noise` is the standard deviation of the noise over `clip`, `rate` the probability that a patient is in a step.
    """

    epsilon: float
    delta: float
    clip: float
    noise: float
    rate: float
    patients_per_step: float
    examples_per_patient: int
    gradients: Gradients
    accountant: Accountant
    lattice: Lattice | None = None

    def spending(self, steps: int) -> Spending:
        """What so many steps cost."""
        return Spending(self.noise, self.rate, steps, 0.0 if self.lattice is None else self.lattice.rho)


def terms_of(privacy: Privacy, site: str, patients: int, steps: int, lattice: Lattice | None = None) -> Terms:
    """The terms of a site with so many training patients, for so many steps in all arms together.

    With a `lattice` the noise is the one that all sites share.

    Raises `StudyError` where the site has too few patients for what the study asks, or `delta` promises nothing.
    """
    if privacy.patients_per_step > patients:
        raise StudyError(
            f"protection.privacy.patients_per_step={privacy.patients_per_step:g} but site {site} has {patients} "
            f"training patients; choose at most {patients}"
        )
    delta = privacy.delta if privacy.delta is not None else 1.0 / (10 * patients)
    if delta >= 1.0 / patients:
        raise StudyError(
            f"protection.privacy.delta={delta:g} would allow to publish a patient of site {site} whole, which has "
            f"{patients}; choose less than {1.0 / patients:.2g}, or leave it out for 1/(10 patients)"
        )
    epsilon, rate = privacy.budget, privacy.patients_per_step / patients
    if lattice is not None:
        noise = lattice.noise
    else:
        noise = privacy.fixed_noise or noise_for(epsilon, delta, rate, steps, privacy.accountant)
    return Terms(
        epsilon=epsilon,
        delta=delta,
        clip=privacy.clip,
        noise=noise,
        rate=rate,
        patients_per_step=privacy.patients_per_step,
        examples_per_patient=privacy.examples_per_patient,
        gradients=privacy.gradients,
        accountant=privacy.accountant,
        lattice=lattice,
    )


@dataclass(frozen=True)
class PrivacyBudget:
    """A site's terms with the ledger that they are charged to and the root of its secret randomness."""

    site: str
    terms: Terms
    ledger: Ledger
    root: SecretRoot

    def pay(self, study: str, arm: str, number: int, steps: int, cohort: str, inputs: Sequence[Any]) -> SecretRound:
        """Charge a round before anything is computed of it; what its noise is drawn from.

        The noise is a function of the root and of `inputs`, which must name everything that the sums depend on. So a
        round that is done again after a crash gives the same bytes and costs nothing more; done again from anything
        else, it draws other noise and is charged again. Raises `BudgetSpent` before the budget is passed, and
        `JournalError` for a ledger that was lost or put back.
        """
        terms = self.terms
        named = [study, arm, number, steps, cohort, canonical_json(asdict(terms)).decode(), *inputs]
        key = self.root.key("round", *named)
        entry = Charge(
            study=study,
            arm=arm,
            round=number,
            steps=steps,
            rate=terms.rate,
            noise=terms.noise,
            rho=terms.spending(1).rho,
            cohort=cohort,
            # Of the key, not of the inputs alone: under another root the same inputs give other noise.
            inputs=hashlib.sha256(b"ledger" + key).hexdigest(),
            when=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self.ledger.spend(entry, self._allowed)
        return SecretRound(SecretRoot(key))

    def _allowed(self, entries: Sequence[Charge]) -> None:
        terms = self.terms
        found = epsilon_of((entry.spending for entry in entries), terms.delta, terms.accountant)
        if found > terms.epsilon:
            raise BudgetSpent(
                f"site {self.site} stops training: one more round would bring its patients' privacy loss to epsilon "
                f"{found:.2f}, and its budget is {terms.epsilon:g} (delta {terms.delta:.2g})"
            )


@dataclass(frozen=True)
class SecretRound:
    """The secret randomness of one round: another stream for every step and purpose, and for every patient.

    A patient's own stream is what keeps the others' randomness as it is when one patient more is there.
    """

    root: SecretRoot

    def noise(self, step: int) -> SecretStream:
        """The stream of a step's noise."""
        return SecretStream(self.root.key(step, "noise"))

    def draws(self, step: int, patient: int, rate: float) -> bool:
        """Whether a patient is in a step: true with probability `rate`, independently of all others."""
        return coin(self.root.key(step, "sampling", patient), rate)

    def patient(self, step: int, patient: int) -> SecretStream:
        """The stream of a patient in a step: for its examples, their augmentation, torch, and rounding."""
        return SecretStream(self.root.key(step, "patient", patient))


def spent(entries: Sequence[Charge], delta: float, accountant: Accountant, study: str | None = None) -> float:
    """The epsilon of a ledger's entries, or of one study's."""
    return epsilon_of((e.spending for e in entries if study in (None, e.study)), delta, accountant)
