"""What happens to whole parties: their processes are killed, disks fill, clocks jump, copies are put back, logs edited.

*Kills* are SIGKILLs of a process that holds the whole federation, at the n-th write, sync, rename, deletion, begin or
commit; the next process goes on. Processes are forked.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from faults_messages import flipped
from faults_study import PLAIN, PRIVATE, ROUNDS, Federation, Known, Setting, ledger_of, opened
from wardround.errors import JournalError, NotEnoughSites
from wardround.storage.database import Database
from wardround.storage.hash_log import LOG
from wardround.storage.verify import verify
from wardround.wire.canonical import digest

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


def life(folder: Path, fatal: int, setting: Setting = PLAIN) -> tuple[int, float, int]:
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
            federation = Federation(folder, setting)
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


def kill(folder: Path, most: int, acts: int, random: Random, setting: Setting = PLAIN) -> tuple[int, list[float]]:
    """One study that is killed again and again; the number of kills, and seconds of each recovery."""
    kills, recoveries = 0, []
    while True:
        # Early and late acts alike; a life that outlives its end is the last.
        code, seconds, _ = life(folder, random.randint(1, acts) if kills < most else 0, setting)
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


def run_once(folder: Path, until: int = ROUNDS, setting: Setting = PLAIN) -> bool:
    """Go on up to a round; whether it was reached."""
    try:
        with opened(folder, setting) as federation:
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


# The privacy ledger --------------------------------------------------------------------------------------------------

LEDGER_FAULTS = ("older", "cut", "torn", "lost", "edited", "reordered", "rewritten")


def spoil_ledger(how: str, path: Path, older: bytes, random: Random) -> None:
    """Replace a ledger of at least one line by one that hides something; `older` is how it was some rounds before."""
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    place = random.randrange(len(lines))
    match how:
        case "older":
            lines = [older]
        case "cut":
            del lines[place:]
        case "torn":
            lines = [whole[: -random.randint(1, len(lines[-1]) - 1)]]
        case "edited":
            line = lines[place]
            at = line.index(b'"round": ') + len(b'"round": ')
            lines[place] = line[:at] + b"9" + line[at + 1 :]
        case "reordered":
            lines.reverse()
        case "rewritten":
            lines = _rewritten(lines, place)
        case _:
            path.unlink()
            return
    path.write_bytes(b"".join(lines))


def _rewritten(lines: list[bytes], place: int) -> list[bytes]:
    """Fewer steps in one line, and every hash from there on made anew."""
    values = [json.loads(line) for line in lines]
    values[place]["steps"] = 0
    for index in range(place, len(values)):
        entry = values[index]
        del entry["hash"]
        if index:
            entry["previous"] = values[index - 1]["hash"]
        entry["hash"] = digest(entry)
    return [json.dumps(entry).encode() + b"\n" for entry in values]


def roll_back(folder: Path, random: Random) -> tuple[int, int, int]:
    """A private study whose sites' ledgers are spoiled before every round but the first, and then put back.

    Returns how often that was, how often the site refused to train, and how often it trained with a spoiled ledger.
    """
    faults = refused = trained = 0
    older: dict[str, bytes] = {}
    for number in range(1, ROUNDS):
        assert run_once(folder, number, PRIVATE)
        name = random.choice(PRIVATE.names)
        path = ledger_of(folder, name)
        whole, before = path.read_bytes(), older.get(name, b"")
        older = {n: ledger_of(folder, n).read_bytes() for n in PRIVATE.names}
        spoil_ledger(_possible(number, random), path, before, random)
        faults += 1
        with opened(folder, PRIVATE) as federation:
            try:
                for _ in federation.rounds():
                    pass
            except NotEnoughSites as error:
                refused += f"{name}: " in str(error) and "does not train with privacy" in str(error)
            trained += bool(federation.learners[name].trained)
        # The newest copy is back.
        path.write_bytes(whole)
    assert run_once(folder, setting=PRIVATE)
    return faults, refused, trained


def _possible(lines: int, random: Random) -> str:
    return random.choice([how for how in LEDGER_FAULTS if how != "reordered" or lines > 1])
