"""A process that has torch loaded and forks a run whenever it is asked: a fresh victim in milliseconds.

One line of JSON in, one line out. A run may be told to kill itself at its n-th durable or otherwise telling act, so
that every instant between two writes can be tried; it reports how many such acts it survived.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from tests.toys import Hold, Regression, toy_sites, toy_study
from wardround import cli
from wardround.errors import WardroundError
from wardround.learning.training import Learner
from wardround.protection.ledger import Ledger
from wardround.runs import session
from wardround.storage.database import Database
from wardround.study.schema import Study


class Acts:
    """Counts what happens and kills the process at a chosen act, without a chance to clean up."""

    def __init__(self, fatal: int, log: Path) -> None:
        self.heard: list[str] = []
        self._fatal = fatal
        self._log = log

    def __call__(self, what: str) -> None:
        self.heard.append(what)
        if len(self.heard) == self._fatal:
            self._log.write_text(what)
            os.kill(os.getpid(), signal.SIGKILL)


def watch(act: Acts) -> None:
    """Put an act before and after every write that lasts, and into the middle of training."""

    def around(owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            act(f"before {name}")
            result = original(*args, **kwargs)
            act(f"after {name}")
            return result

        setattr(owner, name, wrapped)

    around(os, "fsync")
    around(Path, "rename")
    around(Path, "unlink")
    around(Regression, "loss")
    around(Learner, "train")
    around(Ledger, "spend")
    transaction = Database.transaction

    @contextmanager
    def watched(self: Database, *, durable: bool = False) -> Iterator[Any]:
        act("before begin")
        with transaction(self, durable=durable) as connection:
            yield connection
            act("before commit")
        act("after commit")

    Database.transaction = watched  # type: ignore[assignment]


def fill_disk(act: int) -> None:
    """From the n-th durable write on, the disk is full."""
    fsync, seen = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal seen
        seen += 1
        if seen >= act:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    os.fsync = full


def live(job: dict[str, Any]) -> None:
    """The victim's life: one run in a process of its own, and a file that says how it went."""
    out, notes = Path(job["out"]), Path(job["notes"])
    # Where the tests are a background job, a shell has told them to ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "hold" in job:
        os.environ[Hold.VARIABLE], Hold.steps = job["hold"], 0
    if "command" in job:
        command(job["command"], notes)
    acts = Acts(job.get("fatal", 0), notes / "act")
    watch(acts)
    if job.get("full"):
        fill_disk(job["full"])
    study = toy_study(**job.get("study", {}))
    sites = toy_sites(Path(job["data"]), tuple(study.sites))
    try:
        values = session.run(
            study,
            sites,
            out,
            compare=tuple(job.get("compare", ())),
            engine=job.get("engine", "local"),
            processes=job.get("processes"),
        ).values
        said: dict[str, Any] = {k: values[k] for k in ("model_sha256", "local_sha256", "metrics")}
    except WardroundError as error:
        said = {"error": type(error).__name__, "text": str(error)}
    except BaseException as error:
        said = {"error": type(error).__name__, "text": traceback.format_exc()}
    if job.get("listen"):
        said["heard"] = acts.heard
    (notes / "said").write_text(json.dumps({**said, "acts": len(acts.heard)}))


def command(words: list[str], notes: Path) -> NoReturn:
    """The life of a victim that is the command line: what it prints goes to a file, its exit code is its own."""
    printed = os.open(notes / "printed", os.O_WRONLY | os.O_CREAT)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    sys.argv = ["wardround", *words]
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    os._exit(code)


def rehearse(study: Study, compare: Sequence[str] = ()) -> None:
    """One whole run imports whatever is imported late, and finds what is cached, so that no victim has to."""
    with tempfile.TemporaryDirectory() as folder:
        sites = toy_sites(Path(folder), tuple(study.sites))
        session.run(study, sites, Path(folder) / "out", engine="local", compare=compare)


def main() -> None:
    """Fork a victim for every line; say its pid at once."""
    logging.disable(logging.WARNING)
    rehearse(toy_study())
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if "rehearse" in job:
            rehearse(toy_study(**job["rehearse"]["study"]), job["rehearse"]["compare"])
            print(json.dumps("done"), flush=True)
            continue
        if "wait" in job:
            _, status = os.waitpid(job["wait"], 0)
            print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
            continue
        pid = os.fork()
        if not pid:
            try:
                os.setpgid(0, 0)
                sys.stdin.close()
                live(job)
                os._exit(0)
            finally:
                os._exit(1)
        # Here as well: whoever hears of it may signal its group at once.
        os.setpgid(pid, pid)
        print(json.dumps(pid), flush=True)


if __name__ == "__main__":
    main()
