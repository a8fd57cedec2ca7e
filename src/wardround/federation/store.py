"""What a site keeps between messages: private tensors, replies, facts about its data.

State and the reply that reports it are written in one transaction, so that after a crash a site either has done a
message, and answers it again from here, or has not, and does it again.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wardround.errors import JournalError
from wardround.federation.blobs import Blobs
from wardround.federation.database import Database
from wardround.protection.identity import Identity
from wardround.wire.canonical import canonical_json
from wardround.wire.message import EmptyBody, FileBody, Header, Message
from wardround.wire.tensors import TensorFile, TensorWriter, parse_table

Array = npt.NDArray[Any]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS memories (
  round INTEGER PRIMARY KEY, sha256 TEXT NOT NULL, tensors TEXT NOT NULL, meta TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS replies (
  request TEXT PRIMARY KEY, round INTEGER NOT NULL, header TEXT NOT NULL, sha256 TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Memory:
    """Private tensors and small values of a site after a round; never in a message."""

    tensors: Mapping[str, Array]
    meta: Mapping[str, Any]


NOTHING = Memory({}, {})


class SiteStore:
    """The transactional store of one site in one arm."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = Blobs(root / "blobs")
        self._database = Database(root / "store.sqlite", _SCHEMA)
        # What a killed process wrote before its transaction: nothing refers to it.
        self.blobs.keep(self._named())

    def fact(self, name: str) -> str | None:
        """A fact, if it was ever written."""
        rows = self._database.rows("SELECT value FROM facts WHERE name = ?", name)
        return str(rows[0][0]) if rows else None

    def set_fact(self, name: str, value: str) -> None:
        """Write a fact, durably."""
        with self._database.transaction(durable=True) as connection:
            connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    def promise(self, name: str, number: int, value: str) -> str:
        """Give one's word for round `number`, durably, unless it was given for that round or a later one.

        Returns the word that stands. It is what keeps a site from signing two things for one round.
        """
        with self._database.transaction(durable=True) as connection:
            row = connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
            known, standing = json.loads(str(row[0])) if row else (-1, "")
            if number <= known:
                return str(standing)
            connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps([number, value])))
        return value

    def promised(self, name: str) -> int:
        """The last round for which a promise of that name was given; -1 when there is none."""
        fact = self.fact(name)
        return -1 if fact is None else int(json.loads(fact)[0])

    def memory(self, number: int, *, without: Collection[int] = ()) -> Memory:
        """The private state after the last round up to `number` in which the site took part.

        Rounds in `without` are void: what the site learned in them never entered the global model. Raises
        `JournalError` when its file is gone.
        """
        marks = ",".join("?" * len(without))
        rows = self._database.rows(
            f"SELECT sha256, tensors, meta FROM memories WHERE round <= ? AND round NOT IN ({marks}) "
            "ORDER BY round DESC LIMIT 1",
            number,
            *without,
        )
        if not rows:
            return NOTHING
        name, table, meta = (str(v) for v in rows[0])
        tensors = TensorFile(self.blobs.path(name), parse_table(json.loads(table)))
        if not self.blobs.holds(name, tensors.nbytes):
            raise JournalError(
                "a site's store has lost the private part of its model; restore the folder, or start again in another "
                "one",
                detail=str(tensors.path),
            )
        return Memory(tensors, json.loads(meta))

    def reply(self, request: str) -> Message | None:
        """The reply to a request that was already handled; nothing when its body is gone, so that it is made anew."""
        rows = self._database.rows("SELECT header FROM replies WHERE request = ?", request)
        if not rows:
            return None
        header = Header.from_bytes(str(rows[0][0]).encode())
        if not header.body_nbytes:
            return Message(header, EmptyBody())
        if not self.blobs.holds(header.body_sha256, header.body_nbytes):
            return None
        return Message(header, FileBody(self.blobs.path(header.body_sha256), header.body_nbytes))

    @property
    def last_round(self) -> int:
        """The last round of which an answer is kept; -1 when there is none."""
        number = self._database.rows("SELECT max(round) FROM replies")[0][0]
        return -1 if number is None else int(str(number))

    @property
    def identity(self) -> Identity | None:
        """The site's signing key, if it was ever given one."""
        fact = self.fact("identity")
        return None if fact is None else Identity(bytes.fromhex(json.loads(fact)[1]))

    def finish(self, reply: Message, memory: Memory | None, keep: set[int]) -> None:
        """Record a reply and the state it leaves in one transaction; then forget rounds not in `keep`.

        Replies of earlier rounds are forgotten with it: nobody may ask for them again.
        """
        number = reply.header.round
        dropped: set[str] = set()
        with ExitStack() as stack:
            row: tuple[str, str, str] | None = None
            if memory is not None and (memory.tensors or memory.meta):
                with self.blobs.draft(durable=False) as draft:
                    writer = TensorWriter(draft.file)
                    for name, tensor in memory.tensors.items():
                        writer.add(name, np.asarray(tensor))
                    draft.name = writer.sha256
                table = canonical_json([i.to_json() for i in writer.table]).decode()
                row = (writer.sha256, table, canonical_json(dict(memory.meta)).decode())
            connection = stack.enter_context(self._database.transaction())
            if row is not None:
                connection.execute("INSERT OR REPLACE INTO memories VALUES (?,?,?,?)", (number, *row))
                # A site that missed a round goes on using what it had before: that is what `keep` refers to then.
                kept = {
                    connection.execute("SELECT max(round) FROM memories WHERE round <= ?", (k,)).fetchone()[0]
                    for k in {number, *keep}
                }
                marks = ",".join("?" * len(kept))
                gone = f"DELETE FROM memories WHERE round NOT IN ({marks}) RETURNING sha256"
                dropped |= {str(row[0]) for row in connection.execute(gone, tuple(kept)).fetchall()}
            gone = "DELETE FROM replies WHERE round < ? RETURNING sha256"
            dropped |= {str(row[0]) for row in connection.execute(gone, (number,)).fetchall()}
            connection.execute(
                "INSERT OR REPLACE INTO replies VALUES (?,?,?,?)",
                (reply.header.reply_to, number, reply.header.to_bytes().decode(), reply.header.body_sha256),
            )
        if dropped:
            for name in dropped - self._named():
                self.blobs.drop(name)

    def _named(self) -> set[str]:
        """The files that something refers to."""
        rows = self._database.rows("SELECT sha256 FROM memories UNION SELECT sha256 FROM replies")
        return {str(row[0]) for row in rows}

    def close(self) -> None:
        """Close the database."""
        self._database.close()
