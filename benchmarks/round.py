"""What a round costs when nobody trains, and how much memory the coordinator needs for large models.

*Empty round*: 10 sites with a model of 1 MB through the real coordinator, sites, stores and journal, with a learner
that returns at once. The floor is what no protocol can do without, timed alone in the same run: quantising every
update, hashing it at the site and again at the coordinator, verifying the global state at each site, hashing the new
state, and one durable commit.

*Peak*: the coordinator in a process of its own, FedAvg, 32 sites x 200 MB, updates arriving as files; its peak resident
memory minus that after import, over the size of one update.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common import arguments, conditions, finish, median, table

SITES, VALUES = 10, 250_000
BIG_SITES, BIG_VALUES = 32, 50_000_000


def empty_round(rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each empty round and of the floor beside it."""
    from wardround.engines.local import LocalEngine
    from wardround.federation.coordinator import Coordinator, Plan
    from wardround.learning.methods.method import MODEL, Method
    from wardround.learning.training import Trained
    from wardround.plan.sums import round_metrics
    from wardround.site.rules import Rules
    from wardround.site.site import Site
    from wardround.storage.journal import Journal
    from wardround.storage.store import SiteStore
    from wardround.wire.tensors import TensorInfo
    from wardround.wire.update import Layout, encode

    method = Method("equal")
    info = TensorInfo("weight", "float32", (VALUES,))
    layout = Layout((_group(MODEL, info),), round_metrics(()), 64, 1.0)
    change = np.random.default_rng(0).standard_normal(VALUES).astype(np.float32) * 1e-3

    class NoTraining:
        """A learner that has learned already."""

        weighs_by_validation = False

        class dataset:
            @staticmethod
            def fingerprint() -> str:
                return "none"

        def load(self, public: Any, memory: Any) -> None:
            public["model/weight"]

        def train(self, number: int, public: Any, memory: Any) -> Trained:
            return Trained({MODEL: {"weight": change}}, {MODEL: 1.0}, {}, 0.0, 0.0)

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        rules = Rules("study", layout, layout, layout, 0, 7, lint=False, initial_scale=0.05)
        names = tuple(f"S{n}" for n in range(SITES))
        sites: dict[str, Any] = {n: Site(n, rules, NoTraining, SiteStore(root / n)) for n in names}  # type: ignore[arg-type]
        engine = LocalEngine(lambda header: sites[header.site])
        plan = Plan("federated", "study", names, rounds, 1, layout, layout, 0.05, validate_every=0, release="last")
        journal = Journal(root / "coordinator", "study")
        coordinator = Coordinator(plan, method, engine, journal)
        state = coordinator.start(lambda: ({"model/weight": np.zeros(VALUES, np.float32)}, {}))
        scales = {"model/weight": 0.05}
        totals, floors = [], []
        running = coordinator.rounds(state)
        for number in range(rounds):
            began = time.perf_counter()
            next(running)
            totals.append(1e3 * (time.perf_counter() - began))
            floors.append(1e3 * _floor(root, layout, scales, change, number, encode))
    # The first rounds open files and fill caches.
    return totals[2:], floors[2:]


def _floor(root: Path, layout: Any, scales: Any, change: Any, number: int, encode: Any) -> float:
    import sqlite3

    from wardround.storage.blobs import Blobs

    database = sqlite3.connect(root / "floor.sqlite", isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=FULL")
    database.execute("CREATE TABLE IF NOT EXISTS t (n INTEGER, x TEXT)")
    blobs = Blobs(root / "floor-blobs")
    state = np.full(VALUES, number, np.float32).tobytes()
    began = time.perf_counter()
    for site in range(SITES):
        hashlib.sha256(state).hexdigest()
        random = np.random.Generator(np.random.SFC64(site))
        chunks = list(encode(layout, scales, {"model": 1.0}, {"model": {"weight": change}}, {}, random))
        for _ in ("at the site", "at the coordinator"):
            digest = hashlib.sha256()
            for chunk in chunks:
                digest.update(chunk)
    with blobs.draft(durable=True) as draft:
        draft.file.write(state)
        draft.name = hashlib.sha256(state).hexdigest()
    database.execute("INSERT INTO t VALUES (?, ?)", (number, draft.name))
    seconds = time.perf_counter() - began
    database.close()
    return seconds


def _group(name: str, info: Any) -> Any:
    from wardround.wire.update import Group

    return Group(name, (info,))


def make_update(folder: Path) -> None:
    """Write the 200 MB update that every large site sends, in a process of its own."""
    from wardround.wire.message import write_body
    from wardround.wire.random import public_generator
    from wardround.wire.update import encode

    layout = _big_layout()
    random = np.random.default_rng(0)
    tensors = {i.name: random.standard_normal(i.size, dtype=np.float32) * 1e-3 for i in layout.groups[0].tensors}
    scales = {f"model/{name}": 0.05 for name in tensors}
    chunks = encode(layout, scales, {"model": 1.0}, {"model": tensors}, {"loss": 1.0}, public_generator(0, "update"))
    body, digest = write_body(folder / "update", chunks)
    (folder / "update.json").write_text(json.dumps({"nbytes": body.nbytes, "sha256": digest}), encoding="utf-8")


def _big_layout() -> Any:
    from wardround.plan.sums import round_metrics
    from wardround.wire.tensors import TensorInfo
    from wardround.wire.update import Group, Layout

    # Twenty layers of ten megabytes, as a large network has.
    tensors = tuple(TensorInfo(f"layer{n}", "float32", (BIG_VALUES // 20,)) for n in range(20))
    return Layout((Group("model", tensors),), round_metrics(()), 64, 1.0)


def coordinator_peak(folder: Path) -> dict[str, float]:
    """One round of the coordinator, alone in this process."""
    from wardround.federation.coordinator import Coordinator, Plan
    from wardround.federation.exchange import UPDATE
    from wardround.federation.logs import HEAD, shown
    from wardround.learning.methods.method import Method
    from wardround.storage.hash_log import START
    from wardround.storage.journal import Journal
    from wardround.wire.message import FileBody, Message

    layout = _big_layout()
    known = json.loads((folder / "update.json").read_text(encoding="utf-8"))
    after_import = _peak_rss()

    class Arrivals:
        """Every site's update arrives as a file."""

        def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
            for message in messages:
                reply = message.reply(UPDATE, meta={"layout": layout.sha256})
                header = replace(reply.header, body_nbytes=known["nbytes"], body_sha256=known["sha256"])
                header = replace(header, meta={**header.meta, HEAD: shown(START, header)})
                yield Message(header, FileBody(folder / "update", known["nbytes"]))

        def close(self) -> None:
            pass

    sites = tuple(f"S{n}" for n in range(BIG_SITES))
    plan = Plan("federated", "study", sites, 1, 1, layout, layout, 0.05, validate_every=0, release="last")
    coordinator = Coordinator(plan, Method("equal"), Arrivals(), Journal(folder / "coordinator", "study"))

    def initial() -> tuple[dict[str, Any], dict[str, Any]]:
        zeros = np.zeros(BIG_VALUES // 20, np.float32)
        return {f"model/layer{n}": zeros for n in range(20)}, {}

    state = coordinator.start(initial)
    began = time.perf_counter()
    for _ in coordinator.rounds(state):
        pass
    seconds = time.perf_counter() - began
    peak = _peak_rss()
    if "torch" in sys.modules:
        raise SystemExit("the coordinator imported torch")
    return {"ratio": (peak - after_import) / known["nbytes"], "peak_mb": peak / 1e6, "seconds": seconds}


def _peak_rss() -> int:
    # Not getrusage: its peak is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--child", nargs=2, metavar=("MODE", "FOLDER"), help="internal")
    options = parser.parse_args()
    if options.child:
        mode, folder = options.child[0], Path(options.child[1])
        if mode == "make":
            make_update(folder)
            finish({})
        else:
            finish(coordinator_peak(folder))
        return
    repeats = 20 if options.quick else 60
    state = conditions(sites=SITES, megabytes=1, large_sites=BIG_SITES, large_megabytes=200, repeats=repeats)
    totals, floors = empty_round(repeats)
    over = [t - f for t, f in zip(totals, floors, strict=True)]
    with tempfile.TemporaryDirectory() as name:
        for mode in ("make", "peak"):
            done = subprocess.run(
                [sys.executable, __file__, "--child", mode, name], check=True, capture_output=True, text=True
            )
        peak = json.loads(done.stdout.splitlines()[-1])
    table(
        ["", "median"],
        [
            ["empty round, ms", median(totals)],
            ["floor, ms", median(floors)],
            ["over the floor, ms", median(over)],
            ["coordinator, 32 x 200 MB: peak over one update", peak["ratio"]],
            ["  seconds", peak["seconds"]],
        ],
    )
    finish(
        {
            "empty_round_over_floor_ms": median(over),
            "empty_round_ms": median(totals),
            "floor_ms": median(floors),
            "coordinator_peak_ratio": peak["ratio"],
            "coordinator_seconds": peak["seconds"],
            "conditions": state,
        }
    )


if __name__ == "__main__":
    main()
