"""What a site keeps between messages: private tensors, replies, facts about its data.

State and the reply that reports it are written in one transaction, so that after a crash a site either has done a
message, and answers it again from here, or has not, and does it again. What a round of training leaves is on disk
before its reply can count: a site that lost it in a power cut would be behind what others saw of it, for good. Whatever
merely repeats work (other replies, the bodies of replies) is not synced.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from wardround.errors import JournalError
from wardround.protection.identity import Identity
from wardround.storage.blobs import Blobs
from wardround.storage.cipher import StoreCipher, sealed_nbytes
from wardround.storage.database import Database
from wardround.storage.hash_log import Tail
from wardround.wire.canonical import canonical_json
from wardround.wire.files import refuse_links
from wardround.wire.message import EmptyBody, FileBody, Header, Message
from wardround.wire.tensors import TensorFile, TensorWriter, parse_table, tensors_in

Array = npt.NDArray[Any]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS memories (
  round INTEGER PRIMARY KEY, sha256 TEXT NOT NULL, tensors TEXT NOT NULL, meta TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS replies (
  request TEXT PRIMARY KEY, round INTEGER NOT NULL, header TEXT NOT NULL, sha256 TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS log_tail (
  one INTEGER PRIMARY KEY CHECK (one = 1), offset INTEGER NOT NULL, lines BLOB NOT NULL);
"""

_SET_FACT = "INSERT OR REPLACE INTO facts VALUES (?, ?)"
# A fact that only a sealed store has; it does not open with another key.
_SEALED = "sealed"


@dataclass(frozen=True)
class Memory:
    """Private tensors and small values of a site after a round; never in a message."""

    tensors: Mapping[str, Array]
    meta: Mapping[str, Any]


NOTHING = Memory({}, {})


class SiteStore:
    """The transactional store of one site in one arm.

    With a `cipher`, memories and facts are sealed before they are written; what was or will be sent is not. Raises
    `JournalError` for another cipher than the store began with. A reader beside a run that writes must not `tidy`.
    """

    def __init__(self, root: Path, cipher: StoreCipher | None = None, *, tidy: bool = True) -> None:
        self.root = root
        self._cipher = cipher
        self._identity: Identity | None = None
        refuse_links(root)
        self.blobs = Blobs(root / "blobs", tidy=tidy)
        self._database = Database(root / "store.sqlite", _SCHEMA)
        # What a killed process wrote before its transaction: nothing refers to it.
        if tidy:
            self.blobs.keep(self._named())
        self._check_cipher()

    def _check_cipher(self) -> None:
        rows = self._database.rows("SELECT value FROM facts WHERE name = ?", _SEALED)
        if rows and self._cipher is None:
            raise JournalError(
                "a site's store is encrypted and no key was given: set sites.SITE.encryption_key in the sites file",
                detail=str(self.root),
            )
        if rows:
            self.fact(_SEALED)
        elif self._cipher is not None:
            used = "SELECT 1 FROM facts UNION SELECT 1 FROM replies UNION SELECT 1 FROM memories"
            if self._database.rows(used):
                raise JournalError(
                    "a site's store was begun without encryption; take encryption_key out of the sites file, or start "
                    "the run in another folder",
                    detail=str(self.root),
                )
            self.set_fact(_SEALED, "yes")

    @property
    def cipher(self) -> StoreCipher | None:
        """What seals it."""
        return self._cipher

    def _seal(self, name: str, value: str) -> str:
        return value if self._cipher is None else self._cipher.seal(value, name)

    def _unseal(self, name: str, value: str) -> str:
        return value if self._cipher is None else self._cipher.open(value, name)

    def fact(self, name: str) -> str | None:
        """A fact, if it was ever written."""
        rows = self._database.rows("SELECT value FROM facts WHERE name = ?", name)
        return self._unseal(name, str(rows[0][0])) if rows else None

    def set_fact(self, name: str, value: str, *, durable: bool = True) -> None:
        """Write a fact; it survives a power cut unless it is not `durable`."""
        with self._database.transaction(durable=durable) as connection:
            connection.execute(_SET_FACT, (name, self._seal(name, value)))

    def write_once(self, name: str, number: int, value: str) -> str:
        """Give one's word for round `number`, durably, unless it was given for that round or a later one.

        Returns the word that stands. It is what keeps a site from signing two things for one round.
        """
        with self._database.transaction(durable=True) as connection:
            row = connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
            known, standing = json.loads(self._unseal(name, str(row[0]))) if row else (-1, "")
            if number <= known:
                return str(standing)
            word = self._seal(name, json.dumps([number, value]))
            connection.execute(_SET_FACT, (name, word))
        return value

    def last_written(self, name: str) -> int:
        """The last round for which a promise of that name was given; -1 when there is none."""
        fact = self.fact(name)
        return -1 if fact is None else int(json.loads(fact)[0])

    def written_value(self, name: str) -> str | None:
        """The word of the last promise of that name; `None` when there is none."""
        fact = self.fact(name)
        return None if fact is None else str(json.loads(fact)[1])

    def memory(self, number: int, *, without: Collection[int] = ()) -> Memory:
        """The private state after the last round up to `number` in which the site took part.

        Rounds in `without` are aborted: what the site learned in them never entered the global model. Raises
        `JournalError` when its file is gone or changed.
        """
        rows = self._database.rows(
            f"SELECT sha256, tensors, meta FROM memories WHERE round <= ? AND round NOT IN ({_marks(without)}) "
            "ORDER BY round DESC LIMIT 1",
            number,
            *without,
        )
        if not rows:
            return NOTHING
        name, table, meta = (str(v) for v in rows[0])
        tensors = TensorFile(self.blobs.path(name), parse_table(json.loads(table)))
        if not self.blobs.sound(name, tensors.nbytes if self._cipher is None else sealed_nbytes(tensors.nbytes)):
            raise JournalError(
                "a site's store has lost the private part of its model: its file is gone, or changed on the disk; "
                "restore the folder, or start again in another one",
                detail=str(tensors.path),
            )
        values = json.loads(self._unseal("meta", meta))
        if self._cipher is None:
            return Memory(tensors, values)
        # What is sealed cannot be read in place: it is in memory while it is used.
        plain = self._cipher.read(tensors.path)
        return Memory(tensors_in(plain, tensors.table), values)

    def reply(self, request: str) -> Message | None:
        """The reply to a request that was already handled.

        Nothing when its body is gone or changed on the disk: it is made anew then.
        """
        rows = self._database.rows("SELECT header FROM replies WHERE request = ?", request)
        if not rows:
            return None
        header = Header.from_bytes(str(rows[0][0]).encode())
        if not header.body_nbytes:
            return Message(header, EmptyBody())
        if not self.blobs.sound(header.body_sha256, header.body_nbytes):
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
        if self._identity is None and (fact := self.fact("identity")) is not None:
            self._identity = Identity(bytes.fromhex(json.loads(fact)[1]))
        return self._identity

    def enrol(self, identity: Identity | None = None) -> Identity:
        """The site's signing key, made on first use and kept here; the one given, where there is none yet."""
        made = Identity.generate() if identity is None else identity
        return Identity(bytes.fromhex(self.write_once("identity", 0, made.private.hex())))

    @property
    def tail(self) -> Tail | None:
        """The end of the site's log as the last `finish` was given it."""
        rows = self._database.rows("SELECT offset, lines FROM log_tail")
        return None if not rows else Tail(int(str(rows[0][0])), cast("bytes", rows[0][1]))

    def finish(
        self,
        reply: Message,
        memory: Memory | None,
        keep: set[int],
        *,
        aborted: Collection[int] = (),
        tail: Tail | None = None,
        facts: Mapping[str, str] | None = None,
    ) -> None:
        """Record a reply and the state it leaves at once; then forget aborted rounds and others not in `keep`.

        `facts` are written with it: nothing is kept of a request that was refused or never answered. With a memory,
        even an empty one, it survives a power cut, and so does `tail`, the end of the site's log, which needs no sync
        of its own then. Replies of earlier rounds are forgotten with it: they may not be asked for again.
        """
        number = reply.header.round
        dropped: set[str] = set()
        answered: set[str] = set()
        with ExitStack() as stack:
            row: tuple[str, str, str] | None = None
            if memory is not None and (memory.tensors or memory.meta):
                with self.blobs.draft(durable=True) as draft:
                    sealing = None if self._cipher is None else self._cipher.writer(draft.file)
                    writer = TensorWriter(draft.file if sealing is None else cast("BinaryIO", sealing))
                    for name, tensor in memory.tensors.items():
                        writer.add(name, np.asarray(tensor))
                    draft.name = writer.sha256 if sealing is None else sealing.close()
                table = canonical_json([i.to_json() for i in writer.table]).decode()
                row = (draft.name, table, self._seal("meta", canonical_json(dict(memory.meta)).decode()))
            connection = stack.enter_context(self._database.transaction(durable=memory is not None))
            if row is not None:
                # The same memory has another name each time it is sealed.
                again = "SELECT sha256 FROM memories WHERE round = ?"
                dropped |= {str(old[0]) for old in connection.execute(again, (number,)).fetchall()}
                connection.execute("INSERT OR REPLACE INTO memories VALUES (?,?,?,?)", (number, *row))
                # A site that missed a round goes on using what it had before: that is what `keep` refers to then. What
                # it learned in an aborted round is not that.
                latest = f"SELECT max(round) FROM memories WHERE round <= ? AND round NOT IN ({_marks(aborted)})"
                bases = (connection.execute(latest, (k, *aborted)).fetchone()[0] for k in keep)
                kept = {number, *(base for base in bases if base is not None)}
                gone = f"DELETE FROM memories WHERE round NOT IN ({_marks(kept)}) RETURNING sha256"
                dropped |= {str(row[0]) for row in connection.execute(gone, tuple(kept)).fetchall()}
            gone = "DELETE FROM replies WHERE round < ? RETURNING sha256"
            answered |= {str(row[0]) for row in connection.execute(gone, (number,)).fetchall()}
            connection.execute(
                "INSERT OR REPLACE INTO replies VALUES (?,?,?,?)",
                (reply.header.reply_to, number, reply.header.to_bytes().decode(), reply.header.body_sha256),
            )
            sealed = [(name, self._seal(name, value)) for name, value in (facts or {}).items()]
            connection.executemany(_SET_FACT, sealed)
            if tail is not None:
                connection.execute("INSERT OR REPLACE INTO log_tail VALUES (1,?,?)", (tail.offset, tail.lines))
        if unused := dropped | answered:
            for name in unused - self._named():
                # Nothing private stays behind in a file that is written over later.
                self.blobs.drop(name, reuse=name not in dropped)

    def _named(self) -> set[str]:
        """The files that something refers to."""
        rows = self._database.rows("SELECT sha256 FROM memories UNION SELECT sha256 FROM replies")
        return {str(row[0]) for row in rows}

    def close(self) -> None:
        """Close the database."""
        self.blobs.close()
        self._database.close()


def _marks(values: Collection[int]) -> str:
    """As many placeholders."""
    return ",".join("?" * len(values))
