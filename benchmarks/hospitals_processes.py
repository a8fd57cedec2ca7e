"""What hospitals.py reads of processes in /proc: who belongs to a party, their CPU time, memory and connections."""

from __future__ import annotations

import ipaddress
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

WORKER = "wardround.engines.worker"
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Process:
    """One process: who started it, its session, its command, and the CPU seconds that it had."""

    pid: int
    parent: int
    session: int
    command: str
    cpu: float

    @property
    def is_worker(self) -> bool:
        """Whether it is at work on a study's data, and not waiting for messages."""
        return WORKER in self.command


def processes() -> dict[int, Process]:
    """All processes that this user can see."""
    found = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdecimal():
            continue
        with suppress(OSError, ValueError, IndexError):
            folder = Path(entry.path)
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            # The fields after the name: state, parent, group, session, ..., user and system time.
            cpu = (int(fields[11]) + int(fields[12])) / _TICKS
            pid = int(entry.name)
            found[pid] = Process(pid, int(fields[1]), int(fields[3]), command, cpu)
    return found


def command_of(pid: int) -> str:
    """The command of a process; empty where there is none."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def family(root: int) -> list[Process]:
    """A process, all that it started, and what these started; also what was orphaned since, in its session."""
    known = processes()
    members = {pid for pid, process in known.items() if pid == root or process.session == root}
    grown = True
    while grown:
        more = {pid for pid, process in known.items() if process.parent in members} - members
        members |= more
        grown = bool(more)
    return [known[pid] for pid in sorted(members)]


def cpu_seconds(root: int, *, workers: bool = False) -> float:
    """CPU time of a party's processes that live, with its workers or without."""
    return sum(process.cpu for process in family(root) if workers or not process.is_worker)


def peak_gb(root: int) -> float:
    """The sum of the peaks of the resident memory of a party's processes, each at its own time."""
    return sum(_kib(process.pid, "status", "VmHWM:") for process in family(root) if not process.is_worker) * 1024 / 1e9


def private_gb(root: int) -> float:
    """Proportional set size of a party's processes now: a page that several share counts once."""
    shares = (_kib(process.pid, "smaps_rollup", "Pss:") for process in family(root) if not process.is_worker)
    return sum(shares) * 1024 / 1e9


def _kib(pid: int, file: str, key: str) -> int:
    with suppress(OSError, StopIteration, ValueError):
        lines = (Path("/proc") / str(pid) / file).read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1])
    return 0


def foreign_peers(pids: Iterable[int]) -> set[str]:
    """The addresses beyond loopback to which these processes have a connection now."""
    own: set[str] = set()
    for pid in pids:
        with suppress(OSError):
            for descriptor in os.scandir(f"/proc/{pid}/fd"):
                with suppress(OSError):
                    target = os.readlink(descriptor.path)
                    if target.startswith("socket:["):
                        own.add(target[8:-1])
    return {address for inode, address in _peers() if inode in own and not _is_local(address)}


def _peers() -> Iterator[tuple[str, str]]:
    for name in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]:
                fields = line.split()
                yield fields[9], _address(fields[2].rpartition(":")[0])


def _address(text: str) -> str:
    """An address of /proc/net: words of 32 bits, each with its bytes in the machine's (little) order."""
    words = [bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8)]
    return str(ipaddress.ip_address(b"".join(words)))


def _is_local(address: str) -> bool:
    found = ipaddress.ip_address(address)
    mapped = getattr(found, "ipv4_mapped", None)
    # Unspecified: a socket that listens, or has no peer.
    return found.is_loopback or found.is_unspecified or bool(mapped and (mapped.is_loopback or mapped.is_unspecified))


@dataclass
class Lookout:
    """Looks at the parties again and again, in a thread: their connections, and how much memory one of them has."""

    parties: Callable[[], dict[str, int]]
    seconds: float = 0.1
    foreign: set[str] = field(default_factory=set)
    memory: dict[str, float] = field(default_factory=dict)
    looks: int = 0

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Lookout:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(self.seconds):
            for name, root in self.parties().items():
                members = family(root)
                self.foreign |= foreign_peers(process.pid for process in members)
                self.memory[name] = max(self.memory.get(name, 0.0), private_gb(root))
            self.looks += 1
