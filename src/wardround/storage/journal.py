"""The coordinator's record of an arm: what was asked, what came, what was committed.

A round exists once its row is committed, together with the hash of the state it made; until then it can be repeated.
Torch-free, so that restarts are quick.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from wardround.errors import JournalError
from wardround.protection.identity import Identity
from wardround.storage.blobs import Blobs
from wardround.storage.database import Database
from wardround.storage.hash_log import LOG, HashLog, begun_by
from wardround.wire.bill import NO_BILL, Bill
from wardround.wire.canonical import canonical_json
from wardround.wire.files import refuse_links
from wardround.wire.tensors import TensorFile, parse_table

_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS states (
  round INTEGER PRIMARY KEY, public_sha256 TEXT NOT NULL, public_table TEXT NOT NULL,
  private_sha256 TEXT NOT NULL, private_table TEXT NOT NULL, scales TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS receipts (
  round INTEGER, site TEXT, body_sha256 TEXT NOT NULL, UNIQUE (round, site));
CREATE TABLE IF NOT EXISTS decisions (round INTEGER, attempt INTEGER, name TEXT, value TEXT NOT NULL,
  UNIQUE (round, attempt, name));
CREATE TABLE IF NOT EXISTS rounds (round INTEGER PRIMARY KEY, report TEXT NOT NULL);
"""


# The coordinator signs its log after these, with a key that stays in its journal.
SIGNED_EVENTS = ("committed", "aborted")
_LOG_KEY = "log key"


def survivors_of(kind: str) -> str:
    """The name of the decision whose updates are in a secure sum; once it is written, its round cannot be repeated."""
    return f"survivors/{kind}"


@dataclass(frozen=True)
class State:
    """The global state after a round: what sites get (`public`), what only the coordinator keeps (`private`)."""

    round: int
    public: TensorFile
    public_sha256: str
    private: TensorFile
    private_sha256: str
    scales: Mapping[str, float]


@dataclass(frozen=True)
class RoundReport:
    """One line of rounds.jsonl: numbers only, none of them from one patient."""

    arm: str
    round: int
    attempt: int
    participants: tuple[str, ...]
    missing: Mapping[str, str]
    loss: float | None
    validation: Mapping[str, float] | None
    bytes_up: int
    bytes_down: int
    seconds: float
    coordinator_seconds: float
    training_seconds: float
    saturated_share: float
    #: The share of saturated values of the tensor that has most of them.
    saturated: float
    state_sha256: str
    notes: tuple[str, ...] = field(default=())
    #: The sites in whose sums the validation is.
    validated: tuple[str, ...] = field(default=())
    #: Of the messages that `bytes_up` and `bytes_down` count.
    bill: Bill = NO_BILL
    #: Of asynchronous rounds: by participant, how many rounds older than the newest the state was that it trained from.
    staleness: Mapping[str, int] = field(default_factory=dict)
    #: Of asynchronous rounds: by site that was still at work when the round was committed, the round that it was asked.
    at_work: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The line as JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> RoundReport:
        """The report from a line."""
        listed = {name: tuple(value[name]) for name in ("participants", "notes", "validated")}
        return RoundReport(**{**value, **listed, "bill": Bill.from_json(value["bill"])})


class Journal:
    """Transactions of one arm, and its log; `identity` is the hash of study and arm."""

    def __init__(self, root: Path, identity: str) -> None:
        refuse_links(root)
        self.root = root
        self.blobs = Blobs(root / "blobs")
        self._database = Database(root / "journal.sqlite", _SCHEMA)
        found = self.fact("identity")
        if found is None:
            self.set_fact("identity", identity)
        elif found != identity:
            raise JournalError(
                "this folder holds the record of another study: choose another --out, or restore the study file "
                "as it was when the run began",
                detail=str(root),
            )
        key = self._signing_key()
        begun = begun_by(key, SIGNED_EVENTS, study=identity)
        self.record = HashLog(root / LOG, "coordinator", begun, lambda: key)

    def _signing_key(self) -> Identity:
        """The coordinator's key for its log: made once, and durable before the log names it."""
        if self.fact(_LOG_KEY) is None:
            with self._database.transaction(durable=True) as connection:
                made = Identity.generate().private.hex()
                connection.execute("INSERT OR IGNORE INTO facts VALUES (?, ?)", (_LOG_KEY, made))
        return Identity(bytes.fromhex(self.fact(_LOG_KEY) or ""))

    def fact(self, name: str) -> str | None:
        """A fact about the run, if it was ever written."""
        rows = self._database.rows("SELECT value FROM facts WHERE name = ?", name)
        return str(rows[0][0]) if rows else None

    def set_fact(self, name: str, value: str) -> None:
        """Write a fact."""
        with self._database.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    def latest(self) -> State | None:
        """The state of the last committed round."""
        rows = self._database.rows("SELECT max(round) FROM states")
        return None if rows[0][0] is None else self.state(int(str(rows[0][0])))

    def state(self, number: int) -> State:
        """The state after a round; raises `JournalError` when it was not kept, or its files are gone."""
        rows = self._database.rows("SELECT * FROM states WHERE round = ?", number)
        if not rows:
            raise JournalError(f"the state of round {number} was not kept")
        _, public_sha, public_table, private_sha, private_table, scales = (str(v) for v in rows[0])
        public = TensorFile(self.blobs.path(public_sha), parse_table(json.loads(public_table)))
        private = TensorFile(self.blobs.path(private_sha), parse_table(json.loads(private_table)))
        for sha, file in ((public_sha, public), (private_sha, private)):
            if not self.blobs.holds(sha, file.nbytes):
                raise JournalError(
                    f"the record of the run has lost the model of round {number}; restore the folder, or start again "
                    "in another one",
                    detail=str(file.path),
                )
        return State(number, public, public_sha, private, private_sha, json.loads(scales))

    def check(self, state: State) -> None:
        """Read a state whole; raises `JournalError` when its bytes are no longer those that were committed."""
        for sha, file in ((state.public_sha256, state.public), (state.private_sha256, state.private)):
            if not self.blobs.sound(sha, file.nbytes):
                raise JournalError(
                    f"the record of the run has lost the model of round {state.round}: its file changed on the disk; "
                    "restore the folder, or start again in another one",
                    detail=str(file.path),
                )

    def decide(self, number: int, attempt: int, name: str, value: Any) -> Any:
        """Write a decision before it is announced, durably, once: later calls return what was first decided."""
        with self._database.transaction(durable=True) as connection:
            connection.execute(
                "INSERT OR IGNORE INTO decisions VALUES (?,?,?,?)", (number, attempt, name, json.dumps(value))
            )
        rows = self._database.rows(
            "SELECT value FROM decisions WHERE round=? AND attempt=? AND name=?", number, attempt, name
        )
        return json.loads(str(rows[0][0]))

    def rounds_with(self, name: str) -> frozenset[int]:
        """The rounds in which a decision of that name was taken, in any attempt."""
        rows = self._database.rows("SELECT DISTINCT round FROM decisions WHERE name = ?", name)
        return frozenset(int(str(row[0])) for row in rows)

    def aborted(self, kind: str) -> frozenset[int]:
        """The rounds whose survivor list was announced and which were never committed: their numbers are used up.

        Repeating one with other survivors would give away, by difference, what a single site sent.
        """
        rows = self._database.rows("SELECT round FROM rounds")
        return self.rounds_with(survivors_of(kind)) - {int(str(row[0])) for row in rows}

    def standing(self, kind: str) -> Any:
        """The survivor list of the last aborted round after the last committed one, if there is any.

        Sites that signed it consent to no other from the same model, so that no difference of two sums is one site's.
        """
        rows = self._database.rows(
            "SELECT value FROM decisions WHERE name = ? AND round > (SELECT coalesce(max(round), 0) FROM rounds) "
            "ORDER BY round DESC, attempt DESC LIMIT 1",
            survivors_of(kind),
        )
        return json.loads(str(rows[0][0])) if rows else None

    def commit(self, state: State, report: RoundReport | None, receipts: Mapping[str, str]) -> None:
        """Make a round exist: its state, its report and the hash of what each site sent, in one durable transaction.

        A round that was committed before is refused by its primary key, so no update can count twice.
        """
        with self._database.transaction(durable=True) as connection:
            connection.execute(
                "INSERT INTO states VALUES (?,?,?,?,?,?)",
                (
                    state.round,
                    state.public_sha256,
                    canonical_json([i.to_json() for i in state.public.table]).decode(),
                    state.private_sha256,
                    canonical_json([i.to_json() for i in state.private.table]).decode(),
                    canonical_json(dict(state.scales)).decode(),
                ),
            )
            if report is not None:
                connection.execute(
                    "INSERT INTO rounds VALUES (?,?)",
                    (report.round, canonical_json(report.to_json()).decode()),
                )
            connection.executemany(
                "INSERT INTO receipts VALUES (?,?,?)",
                [(state.round, site, sha) for site, sha in receipts.items()],
            )

    def amend(self, report: RoundReport) -> None:
        """Replace a committed report, to add the validation that is only known a round later."""
        with self._database.transaction() as connection:
            line = canonical_json(report.to_json()).decode()
            connection.execute("UPDATE rounds SET report = ? WHERE round = ?", (line, report.round))

    def reports(self) -> list[RoundReport]:
        """The reports of all committed rounds."""
        rows = self._database.rows("SELECT report FROM rounds ORDER BY round")
        return [_report(str(row[0])) for row in rows]

    def receipts(self, number: int) -> dict[str, str]:
        """The sites whose updates a committed round holds, with the hash of what each sent."""
        rows = self._database.rows("SELECT site, body_sha256 FROM receipts WHERE round = ? ORDER BY site", number)
        return {str(site): str(sha) for site, sha in rows}

    def forget_states(self, keep: set[int]) -> None:
        """Delete the states of other rounds, and what only they refer to."""
        with self._database.transaction() as connection:
            marks = ",".join("?" * len(keep))
            connection.execute(f"DELETE FROM states WHERE round NOT IN ({marks})", tuple(keep))
        rows = self._database.rows("SELECT public_sha256, private_sha256 FROM states")
        self.blobs.keep({str(name) for row in rows for name in row}, reuse=True)

    def close(self) -> None:
        """Close the database."""
        self.blobs.close()
        self._database.close()


@lru_cache(maxsize=1 << 12)
def _report(text: str) -> RoundReport:
    """A report of its JSON: a run reads all of its reports in every round."""
    return RoundReport.from_json(json.loads(text))
