"""How a run goes on at a site whose patients withdrew: which data it began with, and what the site says of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from wardround.federation.facts import Patients
from wardround.site.datasets import Datasets
from wardround.site.withdrawn import Begun
from wardround.study.protocols import HeaderFacts
from wardround.tasks.task import Dataset, Named

# Withdrawals that a run may have missed one by one, and whose data are opened again to know them by.
_MOST = 32


@dataclass(frozen=True)
class Said:
    """What a site said of its data when a run began."""

    patients: Patients | None
    set_aside: int | None
    headers: HeaderFacts

    def to_json(self) -> str:
        """As the site's store keeps it."""
        patients = None if self.patients is None else self.patients.model_dump()
        return json.dumps(
            {"patients": patients, "set_aside": self.set_aside, "headers": self.headers.model_dump(mode="json")}
        )

    @classmethod
    def from_json(cls, text: str) -> Said:
        """Read again."""
        value = json.loads(text)
        patients = None if value["patients"] is None else Patients.model_validate(value["patients"])
        return cls(patients, value["set_aside"], HeaderFacts.model_validate(value["headers"]))


class SameData:
    """Whether a site's data are those that a run began with, less patients who withdrew since.

    `first_of` gives the fingerprint of the data that a site first spoke of in the run.
    """

    def __init__(self, site: str, datasets: Datasets, first_of: Callable[[str], str | None]) -> None:
        self._site, self._datasets, self._first_of = site, datasets, first_of

    def follows(self, before: str, now: str) -> bool:
        """Whether data of the fingerprint `before` became those of `now` by withdrawals alone.

        What is made of the data of several sites follows where those of each do.
        """
        owners = self._datasets.owners(self._site)
        if owners == (self._site,):
            return self.begun(before, now) is not None
        return self._datasets.withdrawals(self._site) > 0 and all(self._owner_follows(owner) for owner in owners)

    def _owner_follows(self, owner: str) -> bool:
        first, now = self._first_of(owner), self._datasets.of(owner).fingerprint()
        return first == now or (first is not None and self._begun_of(owner, first, now) is not None)

    def begun(self, before: str, now: str) -> Begun | None:
        """What the run began with, where withdrawals alone led from there to `now`; else `None`."""
        return None if self._datasets.owners(self._site) != (self._site,) else self._begun_of(self._site, before, now)

    def _begun_of(self, site: str, before: str, now: str) -> Begun | None:
        record = self._datasets.withdrawn(site)
        if record is None or before == now or not (count := record.count()):
            return None
        if (known := record.begun(before, now)) is not None:
            return known
        # Nothing says so yet, and the data of those who withdrew may still lie there.
        for first in range(count - 1, max(-1, count - 1 - _MOST), -1):
            data = self._datasets.before(site, first).of(site)
            if data.fingerprint() == before:
                begun = Begun(len(data), _training(data))
                record.step(before, now, begun)
                return begun
        return None

    def tests_with(self, names: Sequence[str]) -> list[str] | None:
        """Who tested before the first of some patients withdrew, in order; `None` where data name no patients."""
        record = self._datasets.withdrawn(self._site)
        places = [] if record is None else record.places(names)
        data = (self._datasets.before(self._site, min(places)) if places else self._datasets).of(self._site)
        return list(data.names("test")) if isinstance(data, Named) else None


def _training(data: Dataset) -> int:
    """How many patients have training examples."""
    owners = getattr(data, "owners", None)
    return data.patients("train") if owners is None else len(set(owners()))
