"""Ten thousand faults, and whether any update was lost or counted twice.

Short studies of three sites and four rounds run through the real coordinator, sites, stores, journal and logs. What a
site learns is a number known beforehand: in round r, site s changes entry (r, s) of the model, no other. The *oracle*
reads the final model alone: an entry that is zero is a lost update, one that differs from its share is an update that
counted twice. It looks into no journal and no log. The model must also be, bit for bit, that of a run without faults,
every site must have kept exactly what four rounds leave, and the logs of every study must verify.

*Messages* are spoiled by an engine between coordinator and site. *Kills* are SIGKILLs of a process that holds the whole
federation, at the n-th write, sync, rename, deletion, begin or commit; the next process goes on. *Disks* are full from
the n-th sync on. *Clocks* jump by up to ten years. *Copies*: journal, site or log is replaced by an older one, or a log
edited, and where that is refused the newest one is put back. Recovery is the time from the start of the process after a
kill to its next committed round (or its end); processes are forked, so what a cold start takes is measured beside it.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from common import arguments, conditions, finish, median, table
from wardround.engines.local import LocalEngine
from wardround.errors import JournalError, NotEnoughSites, WireError
from wardround.federation.coordinator import Coordinator, Plan
from wardround.federation.database import Database
from wardround.federation.exchange import ERROR
from wardround.federation.journal import Journal, State
from wardround.federation.layouts import round_metrics
from wardround.federation.methods.method import MODEL, Method
from wardround.federation.record import LOG
from wardround.federation.site import Rules, Site
from wardround.federation.store import SiteStore
from wardround.federation.training import Trained
from wardround.federation.verify import verify
from wardround.wire.message import Header, Message
from wardround.wire.tensors import TensorInfo
from wardround.wire.update import Group, Layout

SEED = 20261123
NAMES = ("A", "B", "C")
ROUNDS = 4
CHANGE = 0.3
STUDY = "faults"
LAYOUT = Layout(
    (Group(MODEL, (TensorInfo("weight", "float32", (ROUNDS * len(NAMES),)),)),), round_metrics(()), len(NAMES), 1.0
)
# What is trained here has no network to look at.
RULES = Rules(STUDY, LAYOUT, LAYOUT, LAYOUT, 0, 7, lint=False)
PLAN = Plan("federated", STUDY, NAMES, ROUNDS, len(NAMES), LAYOUT, LAYOUT, 1.0, validate_every=0, release="last")
PER_STUDY = 45


class Known:
    """A learner whose update is known: one entry for each round and site. `spoil` spoils what it learns next."""

    class dataset:
        @staticmethod
        def fingerprint() -> str:
            return "known"

    def __init__(self, index: int) -> None:
        self._index = index
        self.spoil: Callable[[Any], Any] | None = None

    def load(self, public: Any, memory: Any) -> None:
        public["model/weight"]

    def train(self, number: int, public: Any, memory: Any) -> Trained:
        change = np.zeros(ROUNDS * len(NAMES), np.float32)
        change[(number - 1) * len(NAMES) + self._index] = CHANGE
        spoil, self.spoil = self.spoil, None
        # What stays at the site must be of every round once, too.
        kept = memory.tensors["kept"] + 2.0 ** (number - 1) if "kept" in memory.tensors else np.ones(1)
        learned = change if spoil is None else spoil(change)
        return Trained({MODEL: {"weight": learned}}, {MODEL: 1.0}, {"kept": kept}, 0.0, 0.0)


class Federation:
    """Everything of one study in one process, on what lies in the folder."""

    def __init__(self, folder: Path) -> None:
        self.learners = {name: Known(index) for index, name in enumerate(NAMES)}
        stores = {name: SiteStore(folder / "sites" / name) for name in NAMES}
        self.sites = {n: Site(n, RULES, lambda n=n: self.learners[n], stores[n]) for n in NAMES}  # type: ignore[misc]
        self.engine: Any = LocalEngine(lambda header: self.sites[header.site])
        self.journal = Journal(folder / "coordinator", STUDY)

    def rounds(self) -> Iterator[int]:
        """Run on; the number of every round that is committed."""
        coordinator = Coordinator(PLAN, Method("equal"), self.engine, self.journal)
        state = coordinator.start(lambda: ({"model/weight": np.zeros(ROUNDS * len(NAMES), np.float32)}, {}))
        for report in coordinator.rounds(state):
            yield report.round

    def last(self) -> State:
        state = self.journal.latest()
        assert state is not None
        return state

    def close(self) -> None:
        self.journal.close()
        for site in self.sites.values():
            site.close()


@contextmanager
def opened(folder: Path) -> Iterator[Federation]:
    federation = Federation(folder)
    try:
        yield federation
    finally:
        federation.close()


# The oracle ----------------------------------------------------------------------------------------------------------


@dataclass
class Verdicts:
    """What the finished studies came to."""

    expected: str
    trials: int = 0
    equal: int = 0
    lost: int = 0
    doubled: int = 0
    site_state_wrong: int = 0
    false_alarms: int = 0

    def judge(self, folder: Path) -> None:
        """Look at the final model of a study that is over."""
        with opened(folder) as federation:
            state = federation.last()
            weight = state.public["model/weight"]
            self.trials += 1
            self.equal += state.public_sha256 == self.expected and state.round == ROUNDS
            share = weight / (CHANGE / len(NAMES))
            self.lost += int((share < 0.5).sum())
            self.doubled += int((share > 1.01).sum())
            for site in federation.sites.values():
                kept = float(site.store.memory(ROUNDS).tensors["kept"][0])
                self.site_state_wrong += kept != 2.0**ROUNDS - 1
        self.false_alarms += bool(verify(folder).damages)


def fault_free(folder: Path) -> str:
    """The hash of the model that every study must end with."""
    with opened(folder) as federation:
        assert list(federation.rounds()) == list(range(1, ROUNDS + 1))
        return federation.last().public_sha256


# Messages ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bytes:
    """A body in memory."""

    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def chunks(self, offset: int = 0) -> Iterator[memoryview]:
        if offset < len(self.data):
            yield memoryview(self.data)[offset:]


def body_of(message: Message) -> bytes:
    return b"".join(bytes(chunk) for chunk in message.body.chunks())


def flipped(data: bytes, random: Random) -> bytes:
    place = random.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << random.randrange(8)]) + data[place + 1 :]


class Line:
    """An engine that spoils what it carries, one fault a message, while the list lasts."""

    def __init__(self, federation: Federation, faults: list[str], seen: list[Message], random: Random) -> None:
        self._federation = federation
        self._faults = faults
        self._seen = seen
        self._random = random
        self.injected: Counter[str] = Counter()

    def close(self) -> None:
        """Nothing is open."""

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        """One fault for each message, and then the honest answers."""
        for message in messages:
            if not self._faults:
                yield self._ask(message)
                continue
            fault = self._faults.pop()
            replies = list(getattr(self, fault)(message))
            # Without anything to replay yet, or with an answer from the store, there is nothing to spoil.
            self.injected[fault] += 1
            yield from replies

    def _ask(self, message: Message) -> Message:
        (reply,) = self._federation.engine.exchange([message])
        if reply.header.kind != ERROR:
            self._seen.append(Message(reply.header, Bytes(body_of(reply))))
        return reply

    def _bent(self, message: Message, change: Callable[[bytes], bytes], **header: Any) -> Iterator[Message]:
        reply = self._ask(message)
        if reply.header.kind != ERROR:
            yield Message(replace(reply.header, **header), Bytes(change(body_of(reply))))
        else:
            yield reply

    def duplicated(self, message: Message) -> Iterator[Message]:
        reply = self._ask(message)
        yield from (reply, reply)

    def asked_twice(self, message: Message) -> Iterator[Message]:
        self._ask(message)
        yield self._ask(message)

    def late(self, message: Message) -> Iterator[Message]:
        """An answer to an earlier request comes before the one to this."""
        yield from self._random.sample(self._seen, min(1, len(self._seen)))
        yield self._ask(message)

    def replayed(self, message: Message) -> Iterator[Message]:
        """An answer from before, in place of this one."""
        reply = self._ask(message)
        old = [m for m in self._seen if m.header.reply_to != message.id]
        yield self._random.choice(old) if old else Message(replace(reply.header, reply_to="0" * 64), reply.body)

    def bit_flip(self, message: Message) -> Iterator[Message]:
        return self._bent(message, lambda data: flipped(data, self._random))

    def oversized(self, message: Message) -> Iterator[Message]:
        return self._bent(message, lambda data: data * 50, body_nbytes=50 * LAYOUT.nbytes)

    def wrong_size(self, message: Message) -> Iterator[Message]:
        return self._bent(message, lambda data: data[:-4], body_nbytes=LAYOUT.nbytes - 4)

    def impossible(self, message: Message) -> Iterator[Message]:
        """A well-formed update whose elements no site may send."""
        import hashlib

        data = b"\xff" * LAYOUT.nbytes
        return self._bent(message, lambda _: data, body_sha256=hashlib.sha256(data).hexdigest())

    def malformed(self, message: Message) -> Iterator[Message]:
        """A flipped bit anywhere in the header: it is not read at all, or read as what it says."""
        reply = self._ask(message)
        try:
            header = Header.from_bytes(flipped(reply.header.to_bytes(), self._random))
        except WireError as error:
            yield message.reply(ERROR, meta={"reason": str(error)})
            return
        yield Message(header, Bytes(body_of(reply)))

    def lost_answer(self, message: Message) -> Iterator[Message]:
        self._ask(message)
        yield message.reply(ERROR, meta={"reason": "the line is dead"})

    def lost_request(self, message: Message) -> Iterator[Message]:
        yield message.reply(ERROR, meta={"reason": "the line is dead"})

    def bent_request(self, message: Message) -> Iterator[Message]:
        """The site gets another global state than was sent."""
        path = self._federation.journal.blobs.root.parent / "bent"
        path.write_bytes(flipped(body_of(message), self._random))
        bent = replace(message, body=replace(message.body, path=path))  # type: ignore[type-var]
        (reply,) = self._federation.engine.exchange([bent])
        yield reply

    def not_a_number(self, message: Message) -> Iterator[Message]:
        return self._spoiled(message, lambda change: change * np.float32("nan"))

    def infinite(self, message: Message) -> Iterator[Message]:
        return self._spoiled(message, lambda change: change / np.float32(1e-45))

    def wrong_shape(self, message: Message) -> Iterator[Message]:
        return self._spoiled(message, lambda change: change[:-1])

    def _spoiled(self, message: Message, spoil: Callable[[Any], Any]) -> Iterator[Message]:
        learner = self._federation.learners[message.header.site]
        learner.spoil = spoil
        with np.errstate(all="ignore"):
            yield self._ask(message)
        learner.spoil = None


MESSAGE_FAULTS = (
    "duplicated", "asked_twice", "late", "replayed", "bit_flip", "oversized", "wrong_size", "impossible", "malformed",
    "lost_answer", "lost_request", "bent_request", "not_a_number", "infinite", "wrong_shape",
)  # fmt: skip


def spoil_messages(folder: Path, count: int, random: Random, by_class: Counter[str]) -> None:
    """One study with so many spoiled messages, gone on with until it is over."""
    faults = [random.choice(MESSAGE_FAULTS) for _ in range(count)]
    seen: list[Message] = []
    over = False
    while not over:
        with opened(folder) as federation:
            line = Line(federation, faults, seen, random)
            federation.engine, line._federation = line, _with(federation, federation.engine)
            try:
                for _ in federation.rounds():
                    pass
                over = True
            except NotEnoughSites:
                pass
            by_class.update(line.injected)
        if over and faults:
            # The study ended before its faults did.
            faults.clear()


def _with(federation: Federation, engine: Any) -> Federation:
    """The same federation behind its own engine."""
    inner = Federation.__new__(Federation)
    inner.__dict__.update({**federation.__dict__, "engine": engine})
    return inner


# Processes, disks, clocks --------------------------------------------------------------------------------------------


def count_acts(act: Callable[[], None]) -> None:
    """Call `act` before and after everything that lasts."""

    def around(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            act()
            result = original(*args, **kwargs)
            act()
            return result

        setattr(owner, name, wrapped)

    for owner, name in ((os, "fsync"), (os, "write"), (Path, "rename"), (Path, "unlink"), (Known, "train")):
        around(owner, name)
    transaction = Database.transaction

    @contextmanager
    def watched(self: Database, *, durable: bool = False) -> Iterator[Any]:
        act()
        with transaction(self, durable=durable) as connection:
            yield connection
            act()
        act()

    Database.transaction = watched  # type: ignore[assignment]


def life(folder: Path, fatal: int) -> tuple[int, float, int]:
    """A process that goes on with a study and kills itself at an act: exit code, seconds to a round, acts."""
    notes = folder.with_suffix(".notes")
    notes.unlink(missing_ok=True)
    pid = os.fork()
    if not pid:
        acts = 0

        def act() -> None:
            nonlocal acts
            acts += 1
            if acts == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            began = time.perf_counter()
            write = notes.write_text
            count_acts(act)
            federation = Federation(folder)
            first = 0.0
            for _ in federation.rounds():
                if not first:
                    first = time.perf_counter() - began
                    write(f"{first} 0")
            write(f"{first or time.perf_counter() - began} {acts}")
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    seconds, acts_seen = notes.read_text().split() if notes.exists() else ("nan", "0")
    notes.unlink(missing_ok=True)
    return os.waitstatus_to_exitcode(status), float(seconds), int(acts_seen)


def kill(folder: Path, most: int, acts: int, random: Random) -> tuple[int, list[float]]:
    """One study that is killed again and again; the number of kills, and seconds of each recovery."""
    kills, recoveries = 0, []
    while True:
        # Early and late acts alike; a life that outlives its end is the last.
        code, seconds, _ = life(folder, random.randint(1, acts) if kills < most else 0)
        if kills and np.isfinite(seconds):
            recoveries.append(seconds)
        if code == 0:
            return kills, recoveries
        assert code == -signal.SIGKILL, code
        kills += 1


@contextmanager
def full_disk(first: int) -> Iterator[None]:
    """From the n-th sync on, the disk is full."""
    fsync, seen = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal seen
        seen += 1
        if seen >= first:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    os.fsync = full
    try:
        yield
    finally:
        os.fsync = fsync


@contextmanager
def wild_clock(random: Random) -> Iterator[None]:
    """Every look at the clock shows another time."""
    clock = time.time
    time.time = lambda: clock() + random.uniform(-3e8, 3e8)
    try:
        yield
    finally:
        time.time = clock


def run_once(folder: Path, until: int = ROUNDS) -> bool:
    """Go on up to a round; whether it was reached."""
    try:
        with opened(folder) as federation:
            if federation.journal.latest() is not None and federation.last().round >= until:
                return True
            for number in federation.rounds():
                if number == until:
                    return True
        return True
    except (JournalError, NotEnoughSites):
        return False


def fill(folder: Path, count: int, random: Random) -> int:
    """One study on a disk that is full again and again; how often it was."""
    faults = 0
    for _ in range(count):
        with full_disk(random.randint(1, 30)):
            if run_once(folder):
                break
        faults += 1
    assert run_once(folder)
    return faults


def jump(folder: Path, count: int, random: Random) -> int:
    """One study whose clock jumps, in every round and restart."""
    for number in range(1, count + 1):
        with wild_clock(random):
            assert run_once(folder, min(number, ROUNDS))
    assert run_once(folder)
    return count


# Copies --------------------------------------------------------------------------------------------------------------


def restore(folder: Path, what: str, random: Random) -> bool:
    """A part of a study is replaced by an older copy; whether that was noticed, after which the newest is put back."""
    before = random.randint(1, ROUNDS - 2)
    assert run_once(folder, before)
    part = folder / what
    old, new = folder.with_suffix(".old"), folder.with_suffix(".new")
    copy(part, old)
    assert run_once(folder, before + 1 if what != "coordinator" else random.randint(before + 1, ROUNDS - 1))
    # All of the party: whoever opens an older store drops the files that it does not know.
    party = folder.joinpath(*Path(what).parts[: 2 if what.startswith("sites") else 1])
    copy(party, new)
    copy(old, part)
    noticed = not run_once(folder)
    if noticed:
        copy(new, party)
    assert run_once(folder)
    return noticed


def copy(source: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    elif target.exists():
        target.unlink()
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)


def edit_log(folder: Path, random: Random) -> bool:
    """A log is edited while its study rests; whether `verify` found it, after which the log is put back."""
    assert run_once(folder, random.randint(2, ROUNDS))
    path = random.choice(sorted(folder.rglob(LOG)))
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    place = random.randrange(1, len(lines) - 1)
    match random.choice(("edit", "delete", "swap", "cut")):
        case "edit":
            lines[place] = flipped(lines[place][:-1], random) + b"\n"
        case "delete":
            del lines[place]
        case "swap":
            lines[place - 1], lines[place] = lines[place], lines[place - 1]
        case _:
            # Before the last anchor: the coordinator's last but one commit, a site's last update.
            mark = b'"event":"sent"' if "sites" in str(path) else b'"event":"committed"'
            marked = [i for i, line in enumerate(lines) if mark in line]
            lines = lines[: marked[-1] if "sites" in str(path) else marked[-2]]
    path.write_bytes(b"".join(lines))
    found = bool(verify(folder).damages)
    path.write_bytes(whole)
    assert run_once(folder)
    return found


# ---------------------------------------------------------------------------------------------------------------------


def cold_start() -> float:
    """Seconds from nothing to a process that could go on with a run."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import wardround.runner.session, torch"], check=True)
        times.append(time.perf_counter() - began)
    return median(times)


def main() -> None:
    """Inject, judge, print."""
    options = arguments(__doc__ or "").parse_args()
    kills_wanted, faults_wanted, others = (40, 1000, 8) if options.quick else (500, 10_000, 100)
    logging.disable(logging.CRITICAL)
    said = conditions(sites=len(NAMES), rounds=ROUNDS, seed=SEED, faults_a_study=PER_STUDY)
    random, by_class, recoveries, kills, noticed = Random(SEED), Counter[str](), [], 0, Counter[str]()
    began, cpu = time.perf_counter(), _cpu()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        verdicts = Verdicts(fault_free(root / "fault-free"))
        number = 0

        def study() -> Path:
            nonlocal number
            number += 1
            return root / f"study-{number}"

        def over(folder: Path) -> None:
            verdicts.judge(folder)
            for path in root.glob(f"{folder.name}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

        _, _, acts = life(folder := study(), 0)
        over(folder)
        while kills < kills_wanted:
            more, seconds = kill(folder := study(), 8, acts, random)
            kills += more
            recoveries += seconds
            over(folder)
        for _ in range(others):
            by_class["disk_full"] += fill(folder := study(), 4, random)
            over(folder)
            by_class["clock_jump"] += jump(folder := study(), 4, random)
            over(folder)
            for what, title in (
                ("coordinator", "coordinator_from_older_copy"),
                ("coordinator/journal.sqlite", "journal_from_older_copy"),
                (f"sites/{random.choice(NAMES)}", "site_from_older_copy"),
                (f"sites/{random.choice(NAMES)}/store.sqlite", "store_from_older_copy"),
            ):
                by_class[title] += 1
                noticed[title] += restore(folder := study(), what, random)
                over(folder)
            by_class["log_changed"] += 1
            noticed["log_changed"] += edit_log(folder := study(), random)
            over(folder)
        while (left := faults_wanted - kills - by_class.total()) > 0:
            spoil_messages(folder := study(), min(left, PER_STUDY), random, by_class)
            over(folder)
    by_class["kill"] = kills
    table(("fault", "injected", "noticed"), [(k, n, noticed.get(k, "")) for k, n in sorted(by_class.items())])
    finish(
        {
            "injected": by_class.total(),
            "kills": kills,
            "by_class": dict(sorted(by_class.items())),
            "noticed": dict(noticed),
            "lost": verdicts.lost,
            "doubled": verdicts.doubled,
            "site_state_wrong": verdicts.site_state_wrong,
            "log_false_alarms": verdicts.false_alarms,
            "recovery_p99_s": round(float(np.quantile(recoveries, 0.99)), 3),
            "recovery_max_s": round(max(recoveries), 3),
            "recoveries": len(recoveries),
            "cold_start_s": round(cold_start(), 2),
            "hash_equal": int(verdicts.equal == verdicts.trials),
            "trials": verdicts.trials,
            "seconds": round(time.perf_counter() - began, 1),
            "cpu_seconds": round(_cpu() - cpu, 1),
            "conditions": said,
        }
    )


def _cpu() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    main()
