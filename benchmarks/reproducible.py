"""The same study on two engines, in several arrival orders, killed and resumed: how many different models come out?

Children run a small reconstruction study on phantoms of three of the demo's hospitals: T1-weighted brains on unlike
scanners, five patients each. Some are killed with SIGKILL at random moments and started again until they finish.
Counted are the distinct hashes of the released model; there must be one.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from common import arguments, conditions, finish, table

STUDY: dict[str, Any] = {
    "name": "reproducible",
    "seed": 11,
    "sites": {"Northfield": {}, "Harbour": {}, "Valley": {}},
    "task": {
        "kind": "reconstruction",
        "size": [128, 128],
        "evaluation": {"baselines": [], "slices": {"per_patient": 1}, "tuning_slices": 1},
    },
    "model": {"kind": "modl", "preset": "tiny"},
    "local": {"steps": 10, "lr": 0.002, "optimizer_state": "keep"},
    "schedule": {"rounds": 6},
}


def make_data(data: Path) -> None:
    """The phantoms of the study's hospitals, which it takes from the demo by their names."""
    from wardround.imaging.phantoms import DEMO_SITES, make_site

    hospitals = {site.name: site for site in DEMO_SITES}
    for name in STUDY["sites"]:
        make_site(data, hospitals[name], 5, STUDY["seed"])


def child(data: Path, out: Path, engine: str, order: int) -> None:
    """Run the study to its end; `order` permutes the replies as they arrive."""
    import wardround
    from wardround.engines.local import LocalEngine
    from wardround.engines.workers import WorkersEngine
    from wardround.study.sites import SiteData, SitesFile
    from wardround.wire.message import Message

    for kind in (LocalEngine, WorkersEngine):
        exchange = kind.exchange

        def shuffled(self: Any, messages: Iterable[Message], exchange: Any = exchange) -> Iterator[Message]:
            replies = list(exchange(self, messages))
            random.Random(order * 1000 + sum(map(ord, replies[0].header.reply_to))).shuffle(replies)
            return iter(replies)

        kind.exchange = shuffled  # type: ignore[method-assign]
    sites = SitesFile(sites={name: SiteData(data=data / name) for name in STUDY["sites"]})
    study = wardround.load_study(STUDY)
    result = wardround.run(study, sites, out, engine=engine, processes=2)  # type: ignore[arg-type]
    print(result.model_sha256)


def finished(data: Path, out: Path, engine: str, order: int, kills: int, chance: random.Random) -> tuple[str, int]:
    """Start the child again and again, killing it `kills` times; the hash, and the kills that hit it running."""
    command = [sys.executable, __file__, "--child", str(data), str(out), engine, str(order)]
    hit = 0
    while True:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        try:
            wait = chance.uniform(4.0, 16.0) if hit < kills else 600.0
            printed, complaints = process.communicate(timeout=wait)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.communicate()
            hit += 1
            continue
        if process.returncode:
            raise SystemExit(complaints.decode()[-2000:])
        return printed.decode().split()[-1], hit


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--child", nargs=4, help="internal: data, out, engine, order")
    options = parser.parse_args()
    if options.child:
        data, out, engine, order = options.child
        child(Path(data), Path(out), engine, int(order))
        return
    study = "3 hospitals of the demo, 5 phantoms each, MoDL tiny, 6 rounds x 10 steps, 128x128"
    state = conditions(study=study, seed=STUDY["seed"])
    chance = random.Random(7)
    plans = [("local", 0, 0), ("workers", 1, 0), ("local", 2, 2), ("workers", 3, 2)]
    if not options.quick:
        plans += [("local", 4, 3), ("workers", 5, 3), ("workers", 6, 3), ("local", 7, 3), ("workers", 8, 4)]
    else:
        plans += [("workers", 4, 1), ("local", 5, 1), ("workers", 6, 1), ("local", 7, 1)]
    rows, hashes = [], set()
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        make_data(data)
        for number, (engine, order, kills) in enumerate(plans):
            began = time.perf_counter()
            found, hit = finished(data, Path(name) / f"run{number}", engine, order, kills, chance)
            hashes.add(found)
            rows.append([engine, order, hit, found[:16], time.perf_counter() - began])
            print(json.dumps(rows[-1]), flush=True)
    table(["engine", "arrival order", "kills", "model", "seconds"], rows)
    finish(
        {
            "hashes": len(hashes),
            "runs": len(rows),
            "engines": len({row[0] for row in rows}),
            "kills": sum(row[2] for row in rows),
            "conditions": state,
        }
    )


if __name__ == "__main__":
    main()
