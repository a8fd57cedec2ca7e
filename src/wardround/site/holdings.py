"""What a site holds in a run: data, store, keys, ledger, records and device, each opened when it is asked for."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from wardround.errors import DataError, JournalError
from wardround.learning.device import CPU, Compute, compute_of
from wardround.plan.arm_specs import ArmSpecs
from wardround.plan.arms import POOLED
from wardround.protection.identity import Identity
from wardround.protection.privacy import PrivacyBudget
from wardround.site.budgets import PrivacyBudgets
from wardround.site.datasets import Datasets, history_of
from wardround.site.delivery import Deliveries
from wardround.site.egress import OPEN, EgressRules
from wardround.site.patients import PatientRows
from wardround.site.shelf import Shelf, clear_shelves, shelf_folder, shelf_of
from wardround.site.withdrawal import SameData
from wardround.site.withdrawn import Begun
from wardround.storage.cipher import StoreCipher
from wardround.storage.hash_log import LOG, HashLog, begun_by
from wardround.storage.store import SiteStore
from wardround.study.protocols import HeaderFacts
from wardround.study.sites import SiteData, SitesFile
from wardround.tasks.task import Dataset, Headed

log = logging.getLogger(__name__)
SENT = "sent"


class Holdings:
    """What one site holds in a run, by the parts that other rooms of the site work with.

    `sites` needs to hold the site's own entry alone; `folder` is where the site keeps what is its own, `datasets` opens
    its data. Updates are rounded from `rounding_root`; without one, from a root that the operating system gives and
    that stays at the site. It signs with `given`, the key that the site has in all its studies; without one, with a key
    that is made for this study.
    """

    def __init__(
        self,
        name: str,
        arm_specs: ArmSpecs,
        sites: SitesFile,
        folder: Path,
        datasets: Datasets,
        *,
        rounding_root: bytes | None = None,
        given: Identity | None = None,
    ) -> None:
        self.name = name
        self.arm_specs = arm_specs
        self.sites = sites
        self.folder = folder
        self.datasets = datasets
        self.rounding_root = rounding_root
        self.same_data = SameData(name, datasets, self.first_of)
        self.budgets = PrivacyBudgets(arm_specs.study, sites, folder, arm_specs.arms, lambda: arm_specs.lattice)
        self._given = given
        self._shelf: tuple[int, Shelf | None] | None = None

    @property
    def entry(self) -> SiteData | None:
        """What its own file says of it; `None` where this machine knows nothing of the site."""
        return self.sites.sites.get(self.name)

    def first_of(self, owner: str) -> str | None:
        """What the data of a site were that it first spoke of in this run; also while another process is at work."""
        root = self.folder / "work" / "sites" / owner / "agent"
        if not root.is_dir():
            return None
        store = SiteStore(root, StoreCipher.of(self.sites.key(owner)), tidy=False)
        try:
            return store.written_value("facts")
        finally:
            store.close()

    def follows(self, before: str, now: str) -> bool:
        """Whether its data of one fingerprint became those of another by withdrawals alone."""
        return self.same_data.follows(before, now)

    def unchanged(self) -> Dataset:
        """Its data; raises `DataError` where they became others than the run began with, other than by withdrawals."""
        dataset = self.datasets.of(self.name)
        own = dataset.fingerprint()
        first = self.store.write_once("facts", 0, own)
        if first != own and not self.follows(first, own):
            raise DataError(f"the data of site {self.name} changed since the run began; restore them")
        return dataset

    def begun(self, dataset: Dataset) -> Begun | None:
        """What the run began with, where patients withdrew since."""
        if not self.datasets.withdrawals(self.name):
            return None
        first = self.store.written_value("facts")
        return None if first is None else self.same_data.begun(first, dataset.fingerprint())

    def budget(self, dataset: Dataset) -> PrivacyBudget:
        begun = self.begun(dataset)
        return self.budgets.of(self.name, dataset, None if begun is None else begun.patients)

    @cached_property
    def store(self) -> SiteStore:
        return SiteStore(self.kept / "agent", self.cipher)

    @property
    def kept(self) -> Path:
        return self.folder / "work" / "sites" / self.name

    @property
    def cipher(self) -> StoreCipher | None:
        return StoreCipher.of(self.sites.key(self.name))

    @property
    def identity(self) -> Identity:
        """The key with which the site signs in all arms; made on first use, where none was given.

        Raises `JournalError` where the site's store was made with another key.
        """
        return enrolled(self.store, self._given)

    @cached_property
    def record(self) -> HashLog:
        begun = begun_by(self.identity, (SENT,), study=self.arm_specs.study_sha256, site=self.name)
        return HashLog(self.store.root / LOG, f"site {self.name}", begun, lambda: self.store.identity)

    @property
    def deliveries(self) -> Deliveries:
        entry = self.entry
        lasts = entry is not None and entry.history is not None
        return Deliveries(self.name, self.arm_specs, self.folder, self.store, self.history, lasts)

    @property
    def egress(self) -> EgressRules:
        # Where data are pooled, one party has all of them anyway.
        return OPEN if self.name == POOLED else self.datasets.egress(self.name)

    @property
    def history(self) -> Path:
        """The folder in which the site records over all studies what it has answered, or this run's own."""
        found = history_of(self.sites, self.folder, self.name)
        assert found is not None
        return found

    @cached_property
    def compute(self) -> Compute:
        """Where the site computes, by its own file.

        What has the data of several computes where all of those do, or on the CPU, with the fewest threads of any.

        Raises `StudyError` where the device is not on this machine, or not fit for a study with privacy.
        """
        members = self.datasets.owners(self.name)
        found = [entry for name in members if (entry := self.sites.sites.get(name))]
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
        rules, study = self.egress, self.arm_specs.study
        if not rules.scanner_facts or study.protection.privacy is not None or not study.trains:
            return HeaderFacts()
        try:
            dataset = self.datasets.of(self.name)
            return dataset.header_facts(rules.least) if isinstance(dataset, Headed) else HeaderFacts()
        except Exception:
            log.debug("the headers of a site cannot be read", exc_info=True)
            return HeaderFacts()

    @cached_property
    def rows(self) -> PatientRows:
        """What the site measured of each patient; a readable table of it where its rules let a single patient out."""
        rules = self.egress
        shown = self.cipher is None and rules.per_site_results and rules.least == 1
        table = self.folder / "sites" / self.name / "patients.csv" if shown else None
        return PatientRows(self.kept / "patients", self.cipher, table)

    @property
    def shelf(self) -> Shelf | None:
        """Where the site keeps what a frozen encoder gives of its images, if the study has one; see `shelf_of`.

        Another one after each withdrawal: what was kept of the images of before is deleted.
        """
        gone = self.datasets.withdrawals(self.name)
        if self._shelf is None or self._shelf[0] != gone:
            self._shelf = gone, self._shelf_after()
        return self._shelf[1]

    def _shelf_after(self) -> Shelf | None:
        owners = self.datasets.owners(self.name)
        # Where data are pooled, the sites may have it already.
        places = []
        for name in dict.fromkeys((self.name, *owners)):
            folder, gone = self.folder / "work" / "sites" / name, self.datasets.withdrawals(name)
            if gone:
                clear_shelves(folder, gone)
            places.append((shelf_folder(folder, gone), StoreCipher.of(self.sites.key(name))))
        datasets = (self.datasets.of(name) for name in (owners if self.name == POOLED else (self.name,)))
        model = self.arm_specs.model_context.on(self.compute).model
        return shelf_of(self.name, model, datasets, places)

    def close(self) -> None:
        """Close what is open; what is asked for again is opened again."""
        self.budgets.close()
        if "store" in self.__dict__:
            self.store.close()
        for name in ("store", "record"):
            self.__dict__.pop(name, None)


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
