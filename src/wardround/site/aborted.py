"""Which rounds came to nothing, as far as a site can tell by itself.

The number of an aborted round of a secure sum is used up, and the study ends one number later. That a round is aborted
is the coordinator's word, and with it further rounds and validations could be had. But an honest coordinator goes on
after an aborted round from the same model. So a number counts where the next round that the site sent a masked update
of began from the very model that this one began from: all that the coordinator gets for it is the same round again. An
aborted round has no model, so none is validated under its number.
"""

from __future__ import annotations

import json
from collections.abc import Set

from wardround.federation.exchange import EVALUATE, RELEASE, TRAIN
from wardround.federation.secure import ADVERTISE
from wardround.storage.store import SiteStore
from wardround.wire.message import Header

# Aborted rounds of a study that a site believes in without having seen them, because it was away or its update was
# lost: as many as stop a run when they come in a row.
UNSEEN = 3
# The promise of which model the site validated as that of a round.
VALIDATED = "measured/validation"
_FACT = "aborted rounds"


class AbortedRounds:
    """What a site knows of the aborted rounds of an arm; it is kept in the site's store."""

    def __init__(self, store: SiteStore) -> None:
        self._store = store
        # The round and the model of the attempt that was offered last.
        self._offered = (-1, "")

    def answered(self, number: int, start: str) -> None:
        """A masked update of round `number`, trained from the model of hash `start`, is about to be answered.

        Not durable by itself: the answer is, and with it what was written before.
        """
        last, before, aborted = self._known()
        if last < number and before == start and not self._validated(last):
            aborted = aborted | {last}
        value = json.dumps({"last": number, "start": start, "aborted": sorted(aborted)})
        self._store.set_fact(_FACT, value, durable=False)

    def believed(self, header: Header, said: Set[int]) -> int:
        """How many rounds of those that a request says are aborted count: the ones seen, and up to `UNSEEN` others."""
        last, before, aborted = self._known()
        seen = aborted & said
        repeated = last < header.round and self._start(header) == before
        if last in said and repeated and not self._validated(last):
            seen |= {last}
        return len(seen) + min(len(said - seen), UNSEEN)

    def saw(self, number: int) -> bool:
        """Whether round `number` came to nothing, as far as the site can tell."""
        return number in self._known()[2]

    def _validated(self, number: int) -> bool:
        """Whether a model was validated as that of round `number`, or of a later one: then it was not aborted."""
        return self._store.last_written(VALIDATED) >= number

    def _start(self, header: Header) -> str:
        """The model from which the round that a request belongs to begins, where that is known; else nothing."""
        if header.kind == TRAIN:
            return header.body_sha256
        # The request with which an attempt at a secure sum begins names the model.
        if header.kind == ADVERTISE:
            trains = header.meta.get("kind") == TRAIN
            self._offered = (header.round, str(header.meta.get("model")) if trains else "")
        number, start = self._offered
        return start if number == header.round and header.kind not in (EVALUATE, RELEASE) else ""

    def _known(self) -> tuple[int, str, frozenset[int]]:
        """The last round that was answered, its start, and the rounds before it that were seen to be aborted."""
        fact = self._store.fact(_FACT)
        if fact is None:
            return -1, "", frozenset()
        value = json.loads(fact)
        return int(value["last"]), str(value["start"]), frozenset(map(int, value["aborted"]))
