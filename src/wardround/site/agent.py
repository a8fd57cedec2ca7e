"""A site's agent: the only opener of its data, stores, ledger and keys. It answers every message that addresses it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from wardround.deidentify import describe_error
from wardround.errors import DataError, JournalError, StudyError, WardroundError, WireError
from wardround.federation.exchange import DONE, Party
from wardround.federation.facts import DELIVER, FACTS, PLAN, SPENT, SiteFacts, SiteSpending, meta_of
from wardround.federation.grouped import GROUPS, SiteGroups
from wardround.federation.plans import plan_of
from wardround.federation.refusals import refusal
from wardround.federation.release import (
    save_model,
    save_release,
    scanners_of_arm,
)
from wardround.federation.statistics import STATISTICS, SiteStatistics
from wardround.imaging.datasets.split import SPLIT_NAMES
from wardround.learning.device import CPU, Compute, Placed, compute_of
from wardround.learning.examples import ExampleStream, SiteExamples, UnionExamples
from wardround.learning.private_training import PrivateTraining
from wardround.learning.training import Learner
from wardround.plan.arm_specs import ArmSpec, ArmSpecs
from wardround.plan.arms import FEDERATED, POOLED, Arm
from wardround.plan.versions import fingerprint
from wardround.protection.identity import Identity
from wardround.protection.privacy import PrivacyBudget
from wardround.protection.rounding import kept_root
from wardround.protection.secret import SecretRoot
from wardround.site.alone import OnlyTests, OwnArm, TrainsAlone
from wardround.site.budgets import PrivacyBudgets, spending_of
from wardround.site.datasets import Datasets, history_of
from wardround.site.delivery import Deliveries
from wardround.site.egress import OPEN, EgressRules
from wardround.site.evaluators import Continued, PrivatePart, evaluators_of, own_model
from wardround.site.finetuned import OF, FineTuned
from wardround.site.groups import OwnGroups
from wardround.site.measured import MeasuredSets
from wardround.site.own_parts import carried_part
from wardround.site.patients import PatientRows
from wardround.site.protocol import SiteProtocol
from wardround.site.quarantine import LIST, counted, keep_list
from wardround.site.renewed import check_some
from wardround.site.rules import rules_of
from wardround.site.secure import SecureUpload
from wardround.site.shelf import Shelf, check_disk, clear_shelves, shelf_folder, shelf_of
from wardround.site.site import Site
from wardround.site.statistics import OwnStatistics
from wardround.site.validating import Validates
from wardround.site.withdrawal import Said, SameData
from wardround.site.withdrawn import Begun
from wardround.storage.cipher import StoreCipher
from wardround.storage.hash_log import LOG, HashLog, begun_by
from wardround.storage.store import SiteStore
from wardround.study.protocols import HeaderFacts
from wardround.study.sites import SitesFile
from wardround.tasks.looks import subject_of
from wardround.tasks.task import Dataset, Headed, Named
from wardround.wire.canonical import digest
from wardround.wire.message import Header, Message

log = logging.getLogger(__name__)
Progress = Callable[[str, str, int, int, int], None]
_SENT = "sent"
# What the site first said of its data, to be said again after withdrawals.
_SAID = "facts/said"
PICTURES = "pictures.npz"
# As much of a kind that nothing knows is kept in a log.
_SHOWN = 40


class Agent:
    """One site of a run.

    `sites` needs to hold the site's own entry alone; `folder` is where the site keeps what is its own, `datasets` opens
    its data. `progress` is called with arm, site, round, step and steps. Updates are rounded from `rounding_root`;
    without one, from a root that the operating system gives and that stays at the site. It signs with `identity`, the
    key that the site has in all its studies; without one, with a key that is made for this study.
    """

    def __init__(
        self,
        name: str,
        arm_specs: ArmSpecs,
        sites: SitesFile,
        folder: Path,
        datasets: Datasets,
        *,
        progress: Progress | None = None,
        rounding_root: bytes | None = None,
        identity: Identity | None = None,
    ) -> None:
        self.name = name
        self._identity = identity
        self._arm_specs = arm_specs
        self._sites = sites
        self._folder = folder
        self._datasets = datasets
        self._progress = progress
        self._rounding_root = rounding_root
        self._same_data = SameData(name, datasets, self._first_of)
        self.budgets = PrivacyBudgets(arm_specs.study, sites, folder, arm_specs.arms, lambda: arm_specs.lattice)
        self._arms: dict[str, Site] = {}
        self._shelf: tuple[int, Shelf | None] | None = None
        hashes = arm_specs.study_sha256, arm_specs.plan_sha256
        self._by_identity = {arm.identity(*hashes): arm for arm in arm_specs.arms.values()}

    # What is asked of it ---------------------------------------------------------------------------------------------

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
        return self.in_arm(arm.name)

    def in_arm(self, arm: str) -> Site:
        """The site in an arm, made when it is first asked."""
        if arm not in self._arms:
            self._arms[arm] = self._build(arm)
        return self._arms[arm]

    def handle(self, request: Message) -> Message:
        """Answer what is asked of the study as a whole: `facts`, `statistics`, `groups`, `spent`, `deliver`.

        All can be asked again and are answered anew. Exceptions become `error` replies with scrubbed reasons.
        """
        try:
            reply = self._answer(request)
            about = {"kind": request.header.kind, "answer": digest(dict(reply.header.meta))}
            about |= {"body_sha256": request.header.body_sha256} if request.header.body_nbytes else {}
            self._record.note(_SENT, about, sync=True)
            return reply
        except Exception as error:
            reason = describe_error(error)
            log.warning("site %s could not answer %r: %s", self.name, request.header.kind[:_SHOWN], reason)
            log.debug("detail: %s", getattr(error, "detail", ""), exc_info=True)
            with suppress(WardroundError):
                self._record.note("failed", {"kind": request.header.kind[:_SHOWN], "reason": reason}, sync=True)
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
            self._deliveries.take(request)
            return request.reply(DONE)
        raise WireError(f"site {self.name} does not know messages of kind {header.kind[:_SHOWN]!r}")

    def facts(self) -> SiteFacts:
        """What the site says of itself, as far as its rules let out.

        Raises `DataError`, and says nothing, where its files tell who patients are and its rule refuses that.
        """
        self._datasets.check_identifiers(self.name)
        egress = self._egress
        patients = found = set_aside = None
        headers = HeaderFacts()
        try:
            dataset = self._datasets.of(self.name)
            self._datasets.settle(self.name)
            self._deliveries.note_patients(dataset)
            own = dataset.fingerprint()
            first = self._store.write_once("facts", 0, own)
            less = first != own and self.follows(first, own)
            # Of data that only patients who withdrew left, the site says what it said of them before, so that nothing
            # is known of those.
            now = first if less else own
            found = SecretRoot.of(self._store).key("fingerprint", self._arm_specs.study_sha256, now).hex()
            # Of other data than the first answer was of, only that they are others: two answers, before and after one
            # patient, would be that patient's.
            if first == own:
                patients, set_aside = counted(dataset, egress)
                headers = self.header_facts()
                if self._store.fact(_SAID) is None:
                    self._store.set_fact(_SAID, Said(patients, set_aside, headers).to_json())
            elif less and (fact := self._store.fact(_SAID)) is not None:
                before = Said.from_json(fact)
                patients, set_aside, headers = before.patients, before.set_aside, before.headers
        except Exception as error:
            # The run may survive it; whoever asks sees that nothing came.
            log.warning("the data of site %s cannot be counted: %s", self.name, describe_error(error))
        keep_list(self.name, self._datasets.aside(self.name), None if self._cipher is not None else self._folder)
        return SiteFacts(
            public_key=self.identity.public.hex(),
            fingerprint=found,
            patients=patients,
            set_aside=set_aside,
            headers=headers,
            machine={**fingerprint(), **self.compute.facts()},
        )

    def spent(self) -> SiteSpending:
        """What the ledger says; raises `StudyError` where the study or the site spends nothing."""
        if self.budgets.rules is None or self.name not in self._arm_specs.study.training_sites:
            raise StudyError(f"site {self.name} spends no privacy in this study")
        return spending_of(self._budget(self._datasets.of(self.name)), self._arm_specs.study_sha256)

    def groups(self) -> SiteGroups:
        """Its results by the columns that its own file declares, of the rows that it has measured in this run.

        Raises `DataError` for a table that cannot be read, and for other data than the run began with.
        """
        entry, study = self._sites.sites.get(self.name), self._arm_specs.study
        if entry is None or entry.groups is None:
            return SiteGroups()
        dataset = self._unchanged()
        rows = {row: values for row in self._row_names if (values := self._rows.of(row)) is not None}
        root = self._rounding_root or kept_root(self._store)
        specs, private = self._arm_specs.task.metrics, study.protection.privacy is not None
        groups = OwnGroups(self.name, specs, self._egress, MeasuredSets(self._history), root, private)
        found = groups.answer(entry.groups, dataset, rows)
        for column in found.columns:
            if column.reason:
                self._record.note("blocked", {"kind": GROUPS, "column": column.name, "reason": column.reason})
        return found

    def statistics(self) -> SiteStatistics:
        """Sums over its images, as far as its rules let out; see `wardround.site.statistics`.

        Raises `StudyError` where the study does not ask for them, and `DataError` for other data than the run began
        with.
        """
        study, task = self._arm_specs.study, self._arm_specs.task
        if not study.site_statistics:
            raise StudyError("the study asks for no statistics of sites (site_statistics is false)")
        own = OwnStatistics(self.name, self._egress, MeasuredSets(self._history), study.protection.privacy is not None)
        found = own.answer(task, subject_of(task), self._unchanged())
        for what, reason in found.withheld.items():
            self._record.note("blocked", {"kind": STATISTICS, "what": what, "reason": reason})
        return found

    def _unchanged(self) -> Dataset:
        """Its data; raises `DataError` where they became others than the run began with, other than by withdrawals."""
        dataset = self._datasets.of(self.name)
        own = dataset.fingerprint()
        first = self._store.write_once("facts", 0, own)
        if first != own and not self.follows(first, own):
            raise DataError(f"the data of site {self.name} changed since the run began; restore them")
        return dataset

    def follows(self, before: str, now: str) -> bool:
        """Whether its data of one fingerprint became those of another by withdrawals alone."""
        return self._same_data.follows(before, now)

    def _first_of(self, owner: str) -> str | None:
        """What the data of a site were that it first spoke of in this run; also while another process is at work."""
        root = self._folder / "work" / "sites" / owner / "agent"
        if not root.is_dir():
            return None
        store = SiteStore(root, StoreCipher.of(self._sites.key(owner)), tidy=False)
        try:
            return store.written_value("facts")
        finally:
            store.close()

    def names(self) -> frozenset[str]:
        """The site's patients whom the study's task finds and who did not withdraw. Raises as opening data does."""
        dataset = self._datasets.of(self.name)
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
            self._rows.drop(self._row_names, places, len(tests or ()), names)
            (self._folder / "sites" / self.name / PICTURES).unlink(missing_ok=True)
        (self._folder / "sites" / self.name / LIST).unlink(missing_ok=True)
        clear_shelves(self._kept)
        return goes_on

    def _without(self, names: Sequence[str]) -> tuple[bool, list[str] | None]:
        """Whether the run goes on without some patients, and who tested while they did; nothing where none can say."""
        first = self._first_of(self.name)
        try:
            now = self._datasets.of(self.name).fingerprint()
            goes_on = first in (None, now) or (first is not None and self.follows(first, now))
        except WardroundError:
            goes_on = False
        try:
            return goes_on, self._same_data.tests_with(names)
        except Exception:
            # Their files may be gone already.
            log.debug("data of before a withdrawal cannot be opened", exc_info=True)
            return goes_on, None

    @property
    def _row_names(self) -> tuple[str, ...]:
        """What a site measures on its test patients."""
        arms = [name for name in self._arm_specs.arms if "/" not in name or name == f"local/{self.name}"]
        return (*self._arm_specs.study.compared_rows, *arms)

    def _begun(self, dataset: Dataset) -> Begun | None:
        """What the run began with, where patients withdrew since."""
        if not self._datasets.withdrawals(self.name):
            return None
        first = self._store.written_value("facts")
        return None if first is None else self._same_data.begun(first, dataset.fingerprint())

    def _budget(self, dataset: Dataset) -> PrivacyBudget:
        begun = self._begun(dataset)
        return self.budgets.of(self.name, dataset, None if begun is None else begun.patients)

    # What it holds ---------------------------------------------------------------------------------------------------

    @cached_property
    def _store(self) -> SiteStore:
        return SiteStore(self._kept / "agent", self._cipher)

    @property
    def _kept(self) -> Path:
        return self._folder / "work" / "sites" / self.name

    @property
    def _cipher(self) -> StoreCipher | None:
        return StoreCipher.of(self._sites.key(self.name))

    @property
    def identity(self) -> Identity:
        """The key with which the site signs in all arms; made on first use, where none was given.

        Raises `JournalError` where the site's store was made with another key.
        """
        return enrolled(self._store, self._identity)

    @cached_property
    def _record(self) -> HashLog:
        begun = begun_by(self.identity, (_SENT,), study=self._arm_specs.study_sha256, site=self.name)
        return HashLog(self._store.root / LOG, f"site {self.name}", begun, lambda: self._store.identity)

    @property
    def _deliveries(self) -> Deliveries:
        entry = self._sites.sites.get(self.name)
        lasts = entry is not None and entry.history is not None
        return Deliveries(self.name, self._arm_specs, self._folder, self._store, self._history, lasts)

    @property
    def _egress(self) -> EgressRules:
        # Where data are pooled, one party has all of them anyway.
        return OPEN if self.name == POOLED else self._datasets.egress(self.name)

    @property
    def _history(self) -> Path:
        """The folder in which the site records over all studies what it has answered, or this run's own."""
        found = history_of(self._sites, self._folder, self.name)
        assert found is not None
        return found

    @cached_property
    def compute(self) -> Compute:
        """Where the site computes, by its own file.

        What has the data of several computes where all of those do, or on the CPU, with the fewest threads of any.

        Raises `StudyError` where the device is not on this machine, or not fit for a study with privacy.
        """
        members = self._datasets.owners(self.name)
        found = [entry for name in members if (entry := self._sites.sites.get(name))]
        entries = {(entry.device, entry.precision) for entry in found}
        compute = compute_of(*entries.pop(), self.name) if len(entries) == 1 else CPU
        compute = replace(compute, threads=min((entry.threads for entry in found), default=1))
        if self.budgets.rules is not None:
            compute.fit_for_privacy()
        return compute

    def header_facts(self) -> HeaderFacts:
        """What the headers of the training images say of the site's scanners, as far as its rules let out.

        Nothing with differential privacy, which has no noise for it, nothing where nothing is trained, and nothing
        where the data cannot be used: a run survives that.
        """
        rules, study = self._egress, self._arm_specs.study
        if not rules.scanner_facts or study.protection.privacy is not None or not study.trains:
            return HeaderFacts()
        try:
            dataset = self._datasets.of(self.name)
            return dataset.header_facts(rules.least) if isinstance(dataset, Headed) else HeaderFacts()
        except Exception:
            log.debug("the headers of a site cannot be read", exc_info=True)
            return HeaderFacts()

    def check_continued(self) -> None:
        """Raise `DataError` where the site's part of the release that the study continues is not what it was."""
        carried = self._carried(self._arm_specs.arms[FEDERATED])
        if carried is not None:
            carried()

    def earlier_fingerprints(self) -> set[str]:
        """What the site's data were in every arm of an earlier process; another key is an error."""
        known: set[str] = set()
        for arm in self._arm_specs.arms.values():
            if (self._kept / arm.folder).exists():
                store = self._store_of(arm)
                fact = store.fact("fingerprint")
                store.close()
                known |= {fact} if fact is not None else set()
        return known

    def close(self) -> None:
        """Close what is open; an agent that is asked again opens it again."""
        while self._arms:
            self._arms.popitem()[1].close()
        self.budgets.close()
        if "_store" in self.__dict__:
            self._store.close()
        for name in ("_store", "_record"):
            self.__dict__.pop(name, None)

    # The site in an arm ----------------------------------------------------------------------------------------------

    def _store_of(self, arm: Arm) -> SiteStore:
        return SiteStore(self._kept / arm.folder, self._cipher)

    def _build(self, arm_name: str) -> Site:
        name, arm_spec = self.name, self._arm_specs.arm_spec(arm_name)
        entry = self._sites.sites.get(name)
        if arm_spec.arm.inside(self._arm_specs.study) and name not in arm_spec.arm.sites:
            raise StudyError(
                f"site {name} has no part in an arm that another site trains alone: under protection.secure it stays "
                "inside that site"
            )
        rules = rules_of(
            self._arm_specs,
            arm_name,
            egress=self._egress,
            lint=entry is not None and entry.lint,
            rounding_root=self._rounding_root,
            catch_up=0 if entry is None else entry.catch_up,
        )
        models = self._folder / "models" / name / arm_spec.arm.folder
        pictures = self._folder / "sites" / name / PICTURES
        store = self._store_of(arm_spec.arm)
        enrolled(store, self.identity)
        carried = self._carried(arm_spec.arm)
        return Site(
            name,
            rules,
            lambda: self.learner(arm_spec),
            store,
            protocol=self._protocol(arm_spec, models),
            evaluators=evaluators_of(
                models,
                pictures,
                self._egress.least,
                labels=self._labels,
                continued=None if carried is None else Continued(carried, name in arm_spec.arm.sites),
                tuned=self._finetuned(arm_spec, models),
            ),
            carried=carried,
            folder=models,
            rows=None if name == POOLED else self._rows,
            sets=None if name == POOLED else MeasuredSets(self._history),
            withdrawals=lambda: self._datasets.withdrawals(name),
            follows=self.follows,
        )

    def _finetuned(self, arm_spec: ArmSpec, models: Path) -> FineTuned | None:
        """How the site fine-tunes what the federation releases; `None` where it does not."""
        arm, arm_specs = arm_spec.arm, self._arm_specs
        update = arm_specs.study.update
        if update is None or update.finetune is None or arm.name != FEDERATED or self.name not in arm.sites:
            return None

        def save(values: Mapping[str, Any], of: str) -> None:
            scanners = scanners_of_arm(arm_specs, arm, {self.name: self.header_facts()})
            own = {name: tensor for name, tensor in values.items() if name not in arm_specs.model_context.frozen}
            rounds = arm_specs.study.schedule.rounds
            save_model(arm_specs, arm_spec, own, rounds, scanners, own_model(models), {OF: of})

        return FineTuned(update.finetune, own_model(models), save)

    def _carried(self, arm: Arm) -> PrivatePart | None:
        """What the site has of the release that the study continues; an arm of one party shares all with itself."""
        release = self._arm_specs.study.continues
        if release is None or arm.alone:
            return None
        update, initial = self._arm_specs.study.update, self._arm_specs.model_context.initial
        releases = (release, *(() if update is None else update.ancestors))
        return cache(partial(carried_part, self.name, releases, self._history, initial))

    @property
    def _labels(self) -> bool:
        """Whether the site's validation patients choose thresholds for a model that the study was given."""
        return not self._arm_specs.study.trains and self.name in self._arm_specs.study.evaluating_sites

    @cached_property
    def _rows(self) -> PatientRows:
        """What the site measured of each patient; a readable table of it where its rules let a single patient out."""
        rules = self._egress
        shown = self._cipher is None and rules.per_site_results and rules.least == 1
        table = self._folder / "sites" / self.name / "patients.csv" if shown else None
        return PatientRows(self._kept / "patients", self._cipher, table)

    def _protocol(self, arm_spec: ArmSpec, models: Path) -> SiteProtocol | None:
        """How the site answers in an arm; nothing special where its updates are summed in the clear."""
        arm, arm_specs = arm_spec.arm, self._arm_specs
        if self.name not in arm.sites:
            return Validates() if self.name in arm.evaluators else OnlyTests()
        if arm.inside(arm_specs.study):
            model = own_model(models)

            def save(release: Any) -> Path:
                scanners = scanners_of_arm(arm_specs, arm, {self.name: self.header_facts()})
                return save_release(arm_specs, arm_spec, release, scanners, model)

            return TrainsAlone(
                OwnArm(
                    plan=plan_of(arm_specs, arm.name),
                    method=arm_spec.method,
                    initial=partial(arm_specs.initial, arm_spec),
                    save=save,
                    model=model,
                )
            )
        threshold, entry = arm.threshold(arm_specs.study), self._sites.sites.get(self.name)
        return (
            None
            if threshold is None
            else SecureUpload(
                threshold,
                history=self._history,
                members=arm.sites,
                expected=None if entry is None else entry.roster_sha256,
            )
        )

    @property
    def shelf(self) -> Shelf | None:
        """Where the site keeps what a frozen encoder gives of its images, if the study has one; see `shelf_of`.

        Another one after each withdrawal: what was kept of the images of before is deleted.
        """
        gone = self._datasets.withdrawals(self.name)
        if self._shelf is None or self._shelf[0] != gone:
            self._shelf = gone, self._shelf_after()
        return self._shelf[1]

    def _shelf_after(self) -> Shelf | None:
        owners = self._datasets.owners(self.name)
        # Where data are pooled, the sites may have it already.
        places = []
        for name in dict.fromkeys((self.name, *owners)):
            folder, gone = self._folder / "work" / "sites" / name, self._datasets.withdrawals(name)
            if gone:
                clear_shelves(folder, gone)
            places.append((shelf_folder(folder, gone), StoreCipher.of(self._sites.key(name))))
        datasets = (self._datasets.of(name) for name in (owners if self.name == POOLED else (self.name,)))
        model = self._arm_specs.model_context.on(self.compute).model
        return shelf_of(self.name, model, datasets, places)

    def learner(self, arm_spec: ArmSpec) -> Learner:
        """What trains and evaluates in an arm; all learners of a process on one device share one model."""
        arm, study, name = arm_spec.arm, self._arm_specs.study, self.name
        if name == POOLED:
            parts = [self._datasets.of(member) for member in arm.members]
            dataset = self._arm_specs.task.pooled(parts)
            offsets = tuple(sum(len(p) for p in parts[:i]) for i in range(len(parts)))
            streams = tuple(ExampleStream(len(p), study.seed, m) for p, m in zip(parts, arm.members, strict=True))
            each = () if study.local.passes is None else tuple(map(study.local.steps_of, map(len, parts)))
            stretches = tuple(steps * study.local.batch for steps in each)
            examples: SiteExamples | UnionExamples = UnionExamples(streams, offsets, study.seed, stretches)
        else:
            dataset = self._datasets.of(name)
            if name in arm.sites:
                check_some(name, len(dataset), study.update)
            examples = SiteExamples(ExampleStream(len(dataset), study.seed, name))
        # Another process may have taken a patient out since.
        self._rows.reread()
        begun = None if name == POOLED else self._begun(dataset)
        report, robust = self._progress, arm.robust(study)
        private = None
        # A site that only evaluates an arm's model spends nothing, and may have no training patients at all.
        if self.budgets.rules is not None and name in arm.sites:
            budget = self._budget(dataset)
            task = Placed(self._arm_specs.task, self.compute)
            private = PrivateTraining(task, dataset, budget, self._arm_specs.study_sha256, arm.name, self.compute)
        if self.shelf is not None:
            check_disk([self.shelf])
        return Learner(
            site=name,
            model_context=self._arm_specs.model_context.on(self.compute),
            dataset=dataset,
            examples=examples,
            method=arm_spec.method,
            policy=arm_spec.policy,
            local=arm.local,
            rounds=study.schedule.rounds,
            seed=study.seed,
            groups=tuple(g.name for g in arm_spec.layout.groups),
            progress=None if report is None else (lambda *step: report(arm.name, name, *step)),
            momentum=0.0 if robust is None else robust.momentum,
            private=private,
            curriculum=arm_spec.curriculum,
            shelf=self.shelf,
            least=self._egress.least,
            pull=self._arm_specs.pull(arm_spec) if name in arm.sites else None,
            samples=None if begun is None else begun.examples,
        )


def enrolled(store: SiteStore, identity: Identity | None) -> Identity:
    """The key that a store signs with, which is `identity` where one is given.

    Raises `JournalError` where the store was made with another one.
    """
    found = store.enrol(identity)
    if identity is not None and found.public != identity.public:
        raise JournalError(
            "the site's store of this study was made with another key than the site's own: restore the key, or the "
            "store that belongs to it"
        )
    return found
