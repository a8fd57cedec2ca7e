"""The hospitals of async.py: real tumours at ten sites, on machines that are slow because they sleep in every step.

And machines whose time is only counted: what a site computes is handed on in the order of a clock that does not run.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from outlines import small_tumours
from wardround.engines.apart import ApartEngine
from wardround.federation.exchange import TRAIN, Engine, Party
from wardround.learning.training import Learner
from wardround.protection.rounding import study_root
from wardround.site.process import AgreedStudy, agent_finder, spec_of
from wardround.study.schema import Study
from wardround.study.sites import SiteData, SitesFile
from wardround.wire.message import Header, Message

#: How many sites each institution's patients are parted among: ten in all, of 6 to 11 patients.
PARTS = {"CS": 2, "DU": 3, "FG": 2, "HT": 3}
SITES = tuple(f"{name}{part}" for name, count in PARTS.items() for part in range(1, count + 1))
SLOW = "HT3"
STEPS, BATCH = 4, 8


def study_of(rounds: int, seed: int, **schedule: Any) -> Study:
    """The study: slices of 64 x 64, FLAIR and post-contrast T1."""
    return Study.model_validate(
        {
            "name": "async",
            "seed": seed,
            "sites": {site: {} for site in SITES},
            "task": small_tumours(0.35),
            "model": {"kind": "monai_unet", "preset": "tiny", "norm": "batch"},
            "method": {"kind": "fedavg", "weights": "equal"},
            "local": {"steps": STEPS, "batch": BATCH, "optimizer": "adam", "lr": 0.005, "optimizer_state": "keep"},
            "schedule": {"rounds": rounds, "min_sites": 2, "validate_every": 3, "release": "last", **schedule},
        }
    )


def sites_file(folder: Path) -> SitesFile:
    """The sites: patients of an institution in the order of their names, dealt round."""
    data, sites = Path(os.environ["WARDROUND_DATA"]) / "lgg", {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in PARTS.items():
        patients = sorted(path.name for path in (data / name).iterdir() if path.is_dir())
        for part in range(count):
            own = folder / f"{name}{part + 1}.txt"
            own.write_text("\n".join(patients[part::count]) + "\n", encoding="utf-8")
            sites[f"{name}{part + 1}"] = SiteData(data=data / name, patients=own)
    return SitesFile(sites=sites)


def engine_of(study: Study, sites: SitesFile, folder: Path, pauses: Mapping[str, float]) -> ApartEngine:
    """A process for each site, which sleeps for its pause, in seconds, in each of its steps."""
    os.environ["PYTHONPATH"] = os.pathsep.join((str(Path(__file__).parent), *filter(None, sys.path)))
    specs = {}
    for site in study.sites:
        own = folder / "hospitals" / site
        own.mkdir(parents=True)
        specs[site] = own / "spec.json"
        agreed = [AgreedStudy(study, own)]
        spec = spec_of(site, sites, own / "spool", agreed, rounding_root=study_root(study.seed), floor=1)
        specs[site].write_text(json.dumps({**spec, "pause": pauses[site]}), encoding="utf-8")
    return ApartEngine("async_task:slowed", specs, folder / "coordinator-spool")


def slowed(spec: dict[str, Any], progress: Any = None) -> Callable[[Header], Party]:
    """The agent of one site, whose machine is slow."""
    pause, backward = float(spec["pause"]), Learner._backward

    def slowly(self: Learner, *arguments: Any) -> Any:
        time.sleep(pause)
        return backward(self, *arguments)

    Learner._backward = slowly  # type: ignore[method-assign]
    _warm_up()
    return agent_finder(spec, progress)


def _warm_up() -> None:
    """Import what training imports, and compute a step: the first round is not that of a process that begins."""
    import torch
    from monai.networks.nets import UNet

    import wardround.tasks.segmentation  # noqa: F401

    torch.set_num_threads(1)
    network = UNet(2, 2, 1, (4, 8), (2,), norm="batch")
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.zeros(2, 2, 64, 64)).square().mean().backward()
    optimizer.step()


class Counted:
    """Sites of one process that train as if side by side: the update that is done first by the clock comes first.

    Training takes a site `durations[site]`, and an update is handed on when its coordinator waits for one, which it
    shows by asking nothing.
    """

    def __init__(self, engine: Engine, durations: Mapping[str, float]) -> None:
        self._engine = engine
        self._durations = durations
        self._turn = threading.Condition()
        self._now = 0.0
        self._due: list[tuple[float, int, str]] = []
        self._count = 0
        self._ready: set[str] = set()

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        """One reply for each message."""
        asked = {message.id: message for message in messages}
        yield from self._engine.exchange(m for m in asked.values() if m.header.kind != TRAIN)
        left = {key: message for key, message in asked.items() if message.header.kind == TRAIN}
        with self._turn:
            for key, message in left.items():
                self._count += 1
                self._due.append((self._now + self._durations[message.header.site], self._count, key))
            if not asked and self._due and not self._ready:
                first = min(self._due)
                self._due.remove(first)
                self._now = first[0]
                self._ready.add(first[2])
                self._turn.notify_all()
        while left:
            with self._turn:
                while not (ours := self._ready & left.keys()):
                    self._turn.wait()
            key = ours.pop()
            yield from self._engine.exchange([left.pop(key)])
            with self._turn:
                self._ready.discard(key)

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()
