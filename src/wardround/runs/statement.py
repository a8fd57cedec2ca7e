"""What result.json says of privacy: what every site's ledger says was spent, and what that promises."""

from __future__ import annotations

from collections.abc import Mapping

from wardround.federation.facts import SiteSpending
from wardround.results.schema import PrivacyStatement, SitePrivacy
from wardround.study.protection import Privacy
from wardround.study.schema import Study

WORDS = {
    "reconstruction-guard": "Noise against reading images out of updates. An epsilon this large promises nothing "
    "against other attacks, such as finding out whether a person was a patient.",
    "moderate": "A budget at which published imaging models keep most of their use; a person who knows all other "
    "patients may still learn something of one.",
    "strict": "A small budget; expect to lose accuracy unless the site has thousands of patients.",
}
SCOPE = (
    "For training patients of each site, under adding or removing one: the models of all arms and rounds together. "
    "The number of a site's training patients is taken as public. Metrics of validation and test patients leave as "
    "sums without noise."
)
SHARED = (
    "Against whoever sees sums over sites only: no site's own noise is enough. A site that takes part knows its own "
    "noise, and sees a sum with that much less."
)


def statement(study: Study, spendings: Mapping[str, SiteSpending]) -> PrivacyStatement | None:
    """`privacy` of result.json: nothing where updates were neither noised nor summed under masks.

    `spendings` are those of every site that trained.
    """
    rules, secure = study.protection.privacy, study.protection.secure
    if rules is None:
        return PrivacyStatement(secure=True) if secure else None
    sites = {site: SitePrivacy(**spent.model_dump(exclude={"version", "shared"})) for site, spent in spendings.items()}
    shared = rules.noise == "distributed" or any(spent.shared for spent in spendings.values())
    return PrivacyStatement(
        secure=secure,
        unit="patient",
        preset=rules.preset,
        epsilon=max(spent.epsilon for spent in spendings.values()),
        budget=rules.budget,
        noise=rules.noise,
        accountant=rules.accountant,
        sites=sites,
        note=" ".join((words(rules), SCOPE, *([SHARED] if shared else []))),
    )


def words(rules: Privacy) -> str:
    """What a study's preset, or its own choice, promises and what it does not."""
    if rules.epsilon is not None or rules.noise_multiplier is not None:
        return "The study's own choice of budget or noise; what it promises is the epsilon of each site."
    return WORDS[rules.preset]
