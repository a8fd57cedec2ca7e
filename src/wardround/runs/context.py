"""A run as its coordinator knows it: what follows from the study, who is asked, how updates become one.

Nothing here opens a site's data, store, ledger or keys: what the coordinator knows of a site came in a message.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from wardround.errors import StudyError
from wardround.federation.commits import Plan
from wardround.federation.exchange import ExchangeFactory, PlainSum
from wardround.federation.plans import plan_of
from wardround.federation.robust import robust_mean
from wardround.federation.secure import secure_sum
from wardround.federation.spooled import each_update
from wardround.plan.arm_specs import ArmSpecs
from wardround.plan.arms import Arm
from wardround.protection.identity import Roster
from wardround.protection.robust import Defence
from wardround.storage.journal import Journal
from wardround.study.places import NO_PLACES, Places
from wardround.study.plugins import NO_PLUGINS, Plugins
from wardround.study.schema import Study


class Context(ArmSpecs):
    """A study with the folder of its run. A run that was resumed goes on `without` some sites.

    They are not asked any more, and arms that cannot do without them are left out.
    """

    def __init__(
        self,
        study: Study,
        out: Path,
        compare: Collection[str],
        without: Collection[str] = (),
        plugins: Plugins = NO_PLUGINS,
        embeddings: Mapping[str, Path] | None = None,
        places: Places = NO_PLACES,
    ) -> None:
        super().__init__(study, tuple(compare), embeddings, plugins, places)
        self.out = out
        self.without = frozenset(without)
        self.asked = tuple(self.arms)
        self._leave_out()

    def _leave_out(self) -> None:
        if unknown := sorted(self.without - self.study.sites.keys()):
            raise StudyError(
                f"--without {unknown[0]}: the study has no such site; it has {', '.join(self.study.sites)}"
            )
        if self.without and self.study.protection.privacy is not None:
            raise StudyError(
                "--without: with protection.privacy the run's statement needs what every site spent; restore the "
                "site's data, or start a new run in another folder"
            )
        gone = [arm for arm in self.arms.values() if self._needs(arm)]
        self.arms = {name: arm for name, arm in self.arms.items() if arm not in gone}
        left, needed = len(self.remaining(self.study.training_sites)), self.study.schedule.min_sites
        if self.without and self.study.trains and left < needed:
            raise StudyError(
                f"--without {', '.join(sorted(self.without))}: {left} training sites are left, and schedule.min_sites "
                f"is {needed}; restore the data, or start a new run in another folder"
            )

    def _needs(self, arm: Arm) -> bool:
        """Whether an arm is nothing without one of the sites that are left out."""
        alone = len(arm.sites) == 1 or arm.name.removeprefix("without/") in self.without
        return alone and not self.without.isdisjoint((*arm.members, arm.name.removeprefix("without/")))

    def remaining(self, sites: Iterable[str]) -> tuple[str, ...]:
        """The sites among those that the run goes on with."""
        return tuple(site for site in sites if site not in self.without)

    def plan(self, name: str) -> Plan:
        """What the coordinator of an arm must know: whom it asks, too."""
        plan = plan_of(self, name)
        return replace(plan, sites=self.remaining(plan.sites), evaluators=self.remaining(plan.evaluators))

    def exchange(self, arm: Arm, journal: Journal, roster: Roster | None) -> ExchangeFactory:
        """How the updates of an arm become one: summed in the clear or under masks, or by a robust rule.

        A sum under masks needs the arm's `roster`.
        """
        threshold, robust = arm.threshold(self.study), arm.robust(self.study)
        if threshold is not None:
            assert roster is not None
            return secure_sum(roster, threshold, journal)
        updates = self.out / "work" / "arms" / arm.folder / "updates"
        if robust is None:
            return each_update(updates) if self.arm_spec(arm.name).method.needs == "updates" else PlainSum
        defence = Defence(robust.rule, robust.tolerated(len(arm.sites)), robust.mixing, robust.gate)
        return robust_mean(defence, updates)
