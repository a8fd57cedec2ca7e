"""A site's agent: the only opener of its data, stores, ledger and keys. It answers every message that addresses it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress

from wardround.deidentify import describe_error
from wardround.errors import StudyError, WardroundError, WireError
from wardround.federation.exchange import DONE, Party
from wardround.federation.facts import DELIVER, FACTS, PLAN, SPENT, SiteFacts, SiteSpending, meta_of
from wardround.federation.grouped import GROUPS, SiteGroups
from wardround.federation.refusals import refusal
from wardround.federation.statistics import STATISTICS, SiteStatistics
from wardround.imaging.datasets.split import SPLIT_NAMES
from wardround.plan.versions import fingerprint
from wardround.protection.rounding import kept_root
from wardround.protection.secret import SecretRoot
from wardround.site.arms import PICTURES, Progress, SiteArms
from wardround.site.budgets import spending_of
from wardround.site.groups import OwnGroups
from wardround.site.holdings import SENT, Holdings
from wardround.site.measured import MeasuredSets
from wardround.site.quarantine import LIST, counted, keep_list
from wardround.site.shelf import clear_shelves
from wardround.site.statistics import OwnStatistics
from wardround.site.withdrawal import Said
from wardround.study.protocols import HeaderFacts
from wardround.tasks.looks import subject_of
from wardround.tasks.task import Named
from wardround.wire.canonical import digest
from wardround.wire.message import Header, Message

log = logging.getLogger(__name__)
# What the site first said of its data, to be said again after withdrawals.
_SAID = "facts/said"
# As much of a kind that nothing knows is kept in a log.
_SHOWN = 40


class Agent:
    """One site of a run: it answers from what it holds (`held`), in the arms of the study (`arms`).

    `progress` is called with arm, site, round, step and steps.
    """

    def __init__(self, held: Holdings, progress: Progress | None = None) -> None:
        self.name = held.name
        self.held = held
        self.arms = SiteArms(held, progress)
        self._arm_specs = held.arm_specs
        hashes = held.arm_specs.study_sha256, held.arm_specs.plan_sha256
        self._by_identity = {arm.identity(*hashes): arm for arm in held.arm_specs.arms.values()}

    @property
    def identities(self) -> tuple[str, ...]:
        """What messages for this agent name: the study, and each of its arms."""
        return (self._arm_specs.study_sha256, *self._by_identity)

    def find(self, header: Header) -> Party:
        """What answers a message: the site in an arm of the study, or the agent for the study as a whole.

        Raises `StudyError` for a message of another study, or of an arm that the site does not take part in.
        """
        if header.study == self._arm_specs.study_sha256:
            return self
        arm = self._by_identity.get(header.study)
        if arm is None:
            raise StudyError("a message of another study, or of an arm that this run does not have")
        return self.arms.site(arm.name)

    def handle(self, request: Message) -> Message:
        """Answer what is asked of the study as a whole: `facts`, `statistics`, `groups`, `spent`, `deliver`.

        All can be asked again and are answered anew. Exceptions become `error` replies with scrubbed reasons.
        """
        try:
            reply = self._answer(request)
            about = {"kind": request.header.kind, "answer": digest(dict(reply.header.meta))}
            about |= {"body_sha256": request.header.body_sha256} if request.header.body_nbytes else {}
            self.held.record.note(SENT, about, sync=True)
            return reply
        except Exception as error:
            reason = describe_error(error)
            log.warning("site %s could not answer %r: %s", self.name, request.header.kind[:_SHOWN], reason)
            log.debug("detail: %s", getattr(error, "detail", ""), exc_info=True)
            with suppress(WardroundError):
                self.held.record.note("failed", {"kind": request.header.kind[:_SHOWN], "reason": reason}, sync=True)
            return refusal(request, error)

    def _answer(self, request: Message) -> Message:
        header = request.header
        if header.site != self.name or header.study != self._arm_specs.study_sha256:
            raise WireError(f"a message for another site or study reached {self.name}")
        if header.kind in (FACTS, SPENT, GROUPS, STATISTICS) and header.meta != {PLAN: self._arm_specs.plan_sha256}:
            raise StudyError(
                f"site {self.name} and the coordinator fill in different defaults of the study: install the same "
                "version of Wardround, and of the study's plug-ins, at both"
            )
        if header.kind == FACTS:
            return request.reply(FACTS, meta=meta_of(self.facts()))
        if header.kind == SPENT:
            return request.reply(SPENT, meta=meta_of(self.spent()))
        if header.kind == GROUPS:
            return request.reply(GROUPS, meta=meta_of(self.groups()))
        if header.kind == STATISTICS:
            return request.reply(STATISTICS, meta=meta_of(self.statistics()))
        if header.kind == DELIVER:
            self.held.deliveries.take(request)
            return request.reply(DONE)
        raise WireError(f"site {self.name} does not know messages of kind {header.kind[:_SHOWN]!r}")

    def facts(self) -> SiteFacts:
        """What the site says of itself, as far as its rules let out.

        Raises `DataError`, and says nothing, where its files tell who patients are and its rule refuses that.
        """
        self.held.datasets.check_identifiers(self.name)
        egress = self.held.egress
        patients = found = set_aside = None
        headers = HeaderFacts()
        try:
            dataset = self.held.datasets.of(self.name)
            self.held.datasets.settle(self.name)
            self.held.deliveries.note_patients(dataset)
            own = dataset.fingerprint()
            first = self.held.store.write_once("facts", 0, own)
            less = first != own and self.held.follows(first, own)
            # Of data that only patients who withdrew left, the site says what it said of them before, so that nothing
            # is known of those.
            now = first if less else own
            found = SecretRoot.of(self.held.store).key("fingerprint", self._arm_specs.study_sha256, now).hex()
            # Of other data than the first answer was of, only that they are others: two answers, before and after one
            # patient, would be that patient's.
            if first == own:
                patients, set_aside = counted(dataset, egress)
                headers = self.held.header_facts()
                if self.held.store.fact(_SAID) is None:
                    self.held.store.set_fact(_SAID, Said(patients, set_aside, headers).to_json())
            elif less and (fact := self.held.store.fact(_SAID)) is not None:
                before = Said.from_json(fact)
                patients, set_aside, headers = before.patients, before.set_aside, before.headers
        except Exception as error:
            # The run may survive it; whoever asks sees that nothing came.
            log.warning("the data of site %s cannot be counted: %s", self.name, describe_error(error))
        keep_list(
            self.name, self.held.datasets.aside(self.name), None if self.held.cipher is not None else self.held.folder
        )
        return SiteFacts(
            public_key=self.held.identity.public.hex(),
            fingerprint=found,
            patients=patients,
            set_aside=set_aside,
            headers=headers,
            machine={**fingerprint(), **self.held.compute.facts()},
        )

    def spent(self) -> SiteSpending:
        """What the ledger says; raises `StudyError` where the study or the site spends nothing."""
        if self.held.budgets.rules is None or self.name not in self._arm_specs.study.training_sites:
            raise StudyError(f"site {self.name} spends no privacy in this study")
        return spending_of(self.held.budget(self.held.datasets.of(self.name)), self._arm_specs.study_sha256)

    def groups(self) -> SiteGroups:
        """Its results by the columns that its own file declares, of the rows that it has measured in this run.

        Raises `DataError` for a table that cannot be read, and for other data than the run began with.
        """
        entry, study = self.held.entry, self._arm_specs.study
        if entry is None or entry.groups is None:
            return SiteGroups()
        dataset = self.held.unchanged()
        rows = {row: values for row in self._row_names if (values := self.held.rows.of(row)) is not None}
        root = self.held.rounding_root or kept_root(self.held.store)
        specs, private = self._arm_specs.task.metrics, study.protection.privacy is not None
        groups = OwnGroups(self.name, specs, self.held.egress, MeasuredSets(self.held.history), root, private)
        found = groups.answer(entry.groups, dataset, rows)
        for column in found.columns:
            if column.reason:
                self.held.record.note("blocked", {"kind": GROUPS, "column": column.name, "reason": column.reason})
        return found

    def statistics(self) -> SiteStatistics:
        """Sums over its images, as far as its rules let out; see `wardround.site.statistics`.

        Raises `StudyError` where the study does not ask for them, and `DataError` for other data than the run began
        with.
        """
        study, task = self._arm_specs.study, self._arm_specs.task
        if not study.site_statistics:
            raise StudyError("the study asks for no statistics of sites (site_statistics is false)")
        own = OwnStatistics(
            self.name, self.held.egress, MeasuredSets(self.held.history), study.protection.privacy is not None
        )
        found = own.answer(task, subject_of(task), self.held.unchanged())
        for what, reason in found.withheld.items():
            self.held.record.note("blocked", {"kind": STATISTICS, "what": what, "reason": reason})
        return found

    def names(self) -> frozenset[str]:
        """The site's patients whom the study's task finds and who did not withdraw. Raises as opening data does."""
        dataset = self.held.datasets.of(self.name)
        if not isinstance(dataset, Named):
            return frozenset()
        return frozenset(name for part in SPLIT_NAMES for name in dataset.names(part))

    def withdraw(self, names: Sequence[str]) -> bool:
        """Delete what the site's folder of this run holds of patients who are on record as withdrawn.

        Returns whether the run can go on without them. What models learned of them stays in these, and so in what the
        site keeps of rounds: private parts, answers that were sent.
        """
        goes_on, tests = self._without(names)
        # One who is not known to have tested may have.
        places = None if tests is None else [tests.index(name) for name in names if name in tests]
        if places is None or places:
            self.held.rows.drop(self._row_names, places, len(tests or ()), names)
            (self.held.folder / "sites" / self.name / PICTURES).unlink(missing_ok=True)
        (self.held.folder / "sites" / self.name / LIST).unlink(missing_ok=True)
        clear_shelves(self.held.kept)
        return goes_on

    def _without(self, names: Sequence[str]) -> tuple[bool, list[str] | None]:
        """Whether the run goes on without some patients, and who tested while they did; nothing where none can say."""
        first = self.held.first_of(self.name)
        try:
            now = self.held.datasets.of(self.name).fingerprint()
            goes_on = first in (None, now) or (first is not None and self.held.follows(first, now))
        except WardroundError:
            goes_on = False
        try:
            return goes_on, self.held.same_data.tests_with(names)
        except Exception:
            # Their files may be gone already.
            log.debug("data of before a withdrawal cannot be opened", exc_info=True)
            return goes_on, None

    @property
    def _row_names(self) -> tuple[str, ...]:
        """What a site measures on its test patients."""
        arms = [name for name in self._arm_specs.arms if "/" not in name or name == f"local/{self.name}"]
        return (*self._arm_specs.study.compared_rows, *arms)

    def close(self) -> None:
        """Close what is open; an agent that is asked again opens it again."""
        self.arms.close()
        self.held.close()
