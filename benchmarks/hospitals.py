"""What a federation of real processes costs: one coordinator and three sites on loopback, certificates on both sides.

*Empty round*: from one commit to the next of a study with a model of 1 MB whose sites take one step of a few values;
the same with 100 MB and 1 GB is what moving, hashing, adding and keeping a model takes. *Idle*: CPU time of all
processes of a party while nothing is asked. *Ready*: from the start of the sites' processes, all at once, to the last
one's first answer at the coordinator. *Recovery*: from kill -9 of one kind of process, which is started again at once,
to the second commit of a round after it, so that a round is counted that began with the process away. *Hash*: whether
the model is the one that the same study gives on one machine. *Outbound*: connections of any process to anything but
loopback, all of them by strace where that is installed, else those that one look in 100 ms at /proc/net finds.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import arguments, conditions, finish, median, table
from hospitals_processes import Lookout, command_of, cpu_seconds, family, peak_gb
from hospitals_study import HERE, SITES, Submitted, local_sha256, study_of

MEGABYTE = 250_000
IDLE_SECONDS = 20.0
_TRACE = ("strace", "-f", "-qq", "-yy", "-e", "trace=connect,sendto,sendmsg,sendmmsg", "-s", "0")
_PEER = re.compile(r'sin6?_port=htons\(\d+\).*?(?:inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)")')
# Over a connected socket of datagrams, which strace shows with both of its ends.
_SENT = re.compile(r"send\w+\(\d+<UDP\w*:\[[^\]>]*->(\[[0-9a-f:.]+\]|[0-9.]+):\d+")


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    empty: int
    large: int
    huge: int
    kills: int


QUICK, FULL = Size(empty=22, large=4, huge=3, kills=1), Size(empty=52, large=7, huge=4, kills=2)


@contextmanager
def federation(folder: Path, carrier: Any, prefix: Mapping[str, tuple[str, ...]] | None = None) -> Iterator[Any]:
    """A rehearsed federation in a folder, nothing of it started; `prefix` is put before parties' commands."""
    from wardround.hospitals.rehearsal import COORDINATOR, rehearse

    data = folder / "data"
    data.mkdir(parents=True)
    made = rehearse(folder / "federation", carrier, {site: {"data": [str(data)]} for site in SITES})
    before = prefix or {}
    usual = [sys.executable, "-m", "wardround", "federation", "start", str(made.coordinator.root)]
    commands = {COORDINATOR: [*before.get(COORDINATOR, ()), *usual]}
    for site, own in made.sites.items():
        party = [sys.executable, str(HERE / "hospitals_party.py"), "site", str(own.root)]
        commands[site] = [*before.get(site, ()), *party]
    made.commands = commands
    try:
        yield made
    finally:
        # NVFlare's have sessions of their own, and a party under strace that is killed leaves them behind.
        members = [process.pid for party in made.processes.values() for process in family(party.pid)]
        made.stop()
        for pid in members:
            if str(folder) in command_of(pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def started(made: Any, study: Submitted) -> float:
    """Start everybody, the coordinator first; seconds from the start of the sites to the last one's first answer."""
    from wardround.hospitals.rehearsal import COORDINATOR

    study.submit()
    made.start(COORDINATOR)
    made.wait_for(lambda: made.coordinator.status.exists(), 60.0, "the coordinator's start")
    # It asks who is not there, too: what is measured begins with the sites.
    made.wait_for(lambda: len(study.state().get("said", {})) == len(SITES), 60.0, "the first questions")
    began = time.perf_counter()
    made.start(*SITES)
    made.wait_for(
        lambda: all(each["state"] != "asked" for each in study.state()["said"].values()), 300.0, "first answers", 0.02
    )
    return time.perf_counter() - began


def idle(made: Any) -> dict[str, float]:
    """Percent of a core that each party uses, over a while."""
    before = {party: cpu_seconds(process.pid) for party, process in made.processes.items()}
    began = time.perf_counter()
    time.sleep(IDLE_SECONDS)
    seconds = time.perf_counter() - began
    return {
        party: 100.0 * (cpu_seconds(process.pid) - before[party]) / seconds for party, process in made.processes.items()
    }


def rounds(made: Any, name: str, values: int, number: int) -> Submitted:
    """A whole study of so many rounds."""
    study = Submitted(made, study_of(name, values, number), counts_cpu=True)
    study.submit()
    study.approve()
    study.finish()
    return study


def kinds(carrier: str, study: str) -> dict[str, tuple[str, str]]:
    """What is killed: whose it is (the coordinator, or site A) and a part of its command; the party itself without.

    The worker is that of a study, whose hash stands in its command: others may idle.
    """
    found = {"worker": ("A", f"{study}/worker.json"), "site": ("A", ""), "coordinator": ("coordinator", "")}
    if carrier == "nvflare":
        found |= {
            "NVFlare's server": ("coordinator", "server_train"),
            "NVFlare's server job": ("coordinator", "runner_process"),
            "NVFlare's client": ("A", "client_train"),
            "NVFlare's client job": ("A", "worker_process"),
        }
    return found


def recovery(made: Any, carrier: str, repeats: int) -> dict[str, float]:
    """Seconds by kind of process, the worst of a few; the study goes on from one to the next."""
    from wardround.hospitals.coordinator.submission import withdraw

    study = Submitted(made, study_of("killed", MEGABYTE, 100_000))
    study.submit()
    study.approve()
    study.wait(lambda: study.last_round() >= 3, "the first rounds")
    found: dict[str, float] = {}
    kills = kinds(carrier, study.sha256)
    for kind, (party, command) in [each for each in kills.items() for _ in range(repeats)]:
        process = made.processes[party]
        began = time.time()
        if command:
            pid = next((each.pid for each in family(process.pid) if command in each.command), None)
            if pid is None:
                raise SystemExit(f"no process of {party} is a {kind}")
            os.kill(pid, signal.SIGKILL)
        else:
            made.kill(party)
            made.start(party)
        at = study.last_round()
        study.wait(lambda at=at: study.last_round() >= at + 2, f"a round after {kind} was killed")  # type: ignore[misc]
        found[kind] = max(found.get(kind, 0.0), time.time() - began)
        print(f"  killed {kind}: {time.time() - began:.1f} s", flush=True)
        reach = study.last_round() + 3
        study.wait(lambda reach=reach: study.last_round() >= reach, "a few rounds")  # type: ignore[misc]
    withdraw(made.coordinator, study.name)
    return found


def outbound(folder: Path, carrier: Any) -> tuple[set[str], str]:
    """The addresses beyond loopback that any process spoke to in a whole study, and how that was looked for."""
    from wardround.hospitals.rehearsal import COORDINATOR

    traces = folder / "traces"
    traces.mkdir(parents=True)
    traced = shutil.which("strace") is not None
    before = {each: (*_TRACE, "-o", str(traces / each)) for each in (COORDINATOR, *SITES)} if traced else {}
    with federation(folder, carrier, before) as made:
        study = Submitted(made, study_of("traced", MEGABYTE, 2))
        with Lookout(lambda: {party: process.pid for party, process in made.processes.items()}) as seen:
            started(made, study)
            study.approve()
            study.finish()
    found = set(seen.foreign)
    for path in traces.iterdir():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            # To connect a socket of datagrams sends nothing: NVFlare asks so for the machine's own address.
            if not re.search(r"connect\(\d+<UDP", line):
                found |= {one or other for one, other in _PEER.findall(line)}
            found |= {peer.strip("[]") for peer in _SENT.findall(line)}
    if traced and not found:
        raise SystemExit("strace saw no connection at all, not even to loopback")
    local = {address for address in found if address.startswith("127.") or address in ("::1", "0.0.0.0", "::")}
    return found - local, "strace of connect and sendto" if traced else "looks at /proc/net"


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--carrier", choices=("https", "nvflare"), default="nvflare", help="default: nvflare")
    parser.add_argument("--folder", type=Path, help="where 20 GB of files fit (default: a temporary folder)")
    parser.add_argument("--only", help="parts, by commas: empty, large, huge, recovery, outbound (default: all)")
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    parts = set((options.only or "empty,large,huge,recovery,outbound").split(","))
    # The parties' processes find the study's task.
    paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(os.path.abspath(p) for each in paths for p in each.split(":") if p)
    state = conditions(carrier=options.carrier, sites=len(SITES), quick=options.quick)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        values = measured(Path(name), options.carrier, size, parts)
    table(
        ["", "value"], [[key.replace("_", " "), value] for key, value in values.items() if not isinstance(value, dict)]
    )
    finish({**values, "conditions": {**state, "load_after": round(os.getloadavg()[0], 2)}})


def measured(folder: Path, carrier: str, size: Size, parts: set[str]) -> dict[str, Any]:
    """All numbers of the parts; one that is not measured is null."""
    keys = (
        "round_overhead_s idle_cpu_percent_server idle_cpu_percent_site round_100mb_s round_1gb_s "
        "coordinator_peak_gb_1gb site_ready_s recovery_s hash_equal_to_local outbound_connections"
    )
    found: dict[str, Any] = dict.fromkeys(keys.split())
    if parts & {"empty", "recovery", "large"}:
        with federation(folder, carrier) as made:
            found |= small(made, folder, carrier, size, parts)
    if "huge" in parts:
        found |= huge(folder / "huge", carrier, size.huge)
    if "outbound" in parts:
        peers, how = outbound(folder / "outbound", carrier)
        found["outbound_connections"] = len(peers)
        found["outbound"] = {"peers": sorted(peers), "found_by": how}
    return found


def small(made: Any, folder: Path, carrier: str, size: Size, parts: set[str]) -> dict[str, Any]:
    """What is measured in one federation that stays up."""
    found: dict[str, Any] = {}
    first = Submitted(made, study_of("empty", MEGABYTE, size.empty if "empty" in parts else 1))
    found["site_ready_s"] = started(made, first)
    note("site_ready_s", found)
    first.approve()
    model = first.finish()
    if "empty" in parts:
        found["round_overhead_s"] = median(first.round_seconds(2))
        note("round_overhead_s", found)
        found["hash_equal_to_local"] = int(model == local_sha256(first.values, folder / "local"))
        spent = idle(made)
        found["idle_cpu_percent_server"] = spent["coordinator"]
        found["idle_cpu_percent_site"] = max(spent[site] for site in SITES)
        note("idle_cpu_percent_server", found)
        note("idle_cpu_percent_site", found)
    if "recovery" in parts:
        found["recovery"] = recovery(made, carrier, size.kills)
        found["recovery_s"] = max(found["recovery"].values())
    if "large" in parts:
        study = rounds(made, "large", 100 * MEGABYTE, size.large)
        found["round_100mb_s"] = median(study.round_seconds(1))
        found["round_100mb_cpu_s"] = median(study.round_cpu_seconds(1))
        note("round_100mb_s", found)
        note("round_100mb_cpu_s", found)
    return found


def huge(folder: Path, carrier: Any, number: int) -> dict[str, float]:
    """Rounds of 1 GB in a federation whose processes did nothing before."""
    with federation(folder, carrier) as made:
        study = Submitted(made, study_of("huge", 1000 * MEGABYTE, number), counts_cpu=True)
        started(made, study)
        coordinator = made.processes["coordinator"].pid
        with Lookout(lambda: {party: process.pid for party, process in made.processes.items()}, 1.0) as seen:
            study.approve()
            study.finish()
        values = {
            "round_1gb_s": median(study.round_seconds(1)),
            "round_1gb_cpu_s": median(study.round_cpu_seconds(1)),
            "coordinator_peak_gb_1gb": peak_gb(coordinator),
            "coordinator_peak_pss_gb_1gb": seen.memory.get("coordinator", 0.0),
        }
    for key in values:
        note(key, values)
    return values


def note(key: str, found: Mapping[str, Any]) -> None:
    """Say a number as soon as it is there: the whole takes a while."""
    print(f"{key}: {found[key]:.3f} (load {os.getloadavg()[0]:.1f})", flush=True)


if __name__ == "__main__":
    main()
