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
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from arrivals import Federation, measured
from common import arguments, conditions, finish, median, table

SITES, VALUES = 10, 250_000
LARGE = Federation(sites=32, values=50_000_000)


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

        measures_validation = False

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


def main() -> None:
    parser = arguments(__doc__ or "")
    options = parser.parse_args()
    repeats = 20 if options.quick else 60
    state = conditions(sites=SITES, megabytes=1, large_sites=LARGE.sites, large_megabytes=200, repeats=repeats)
    totals, floors = empty_round(repeats)
    over = [t - f for t, f in zip(totals, floors, strict=True)]
    with tempfile.TemporaryDirectory() as name:
        measured("make", Path(name), LARGE)
        peak = measured("peak", Path(name), LARGE)
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
