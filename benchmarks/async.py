"""One hospital of ten is ten times slower: rounds that wait for it, and rounds that do not.

Ten sites outline real tumours (TCGA-LGG, 64 x 64), each in a process of its own. Machines are simulated: a site sleeps
in each of its steps, `PAUSE` seconds, and the slow one ten times as long, so that all of them fit one computer. What a
step computes comes on top, alike at all sites. Synchronous rounds wait for all ten sites. Asynchronous rounds are
committed with nine updates, and as many of them as come to at least the same number of updates, hence of examples.

For further seeds, which measure Dice alone, time is counted and not waited for: the same study on one machine, whose
updates come in the order in which they would.

`synchronous_seconds` and `asynchronous_seconds` are from the first request to the commit of the last round, validations
of rounds included; the final tests of all sites come after. `speedup` is the ratio to the same number of examples,
`speedup_to_dice` that to the validation Dice that the synchronous run ends with (over the sites that trained from the
round's state, three rounds' median). Dice is the mean over sites of test patients; `dice_gap` is the median over seeds.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import arguments, conditions, finish, median, need_images, table

#: Seconds that a site sleeps in a step, and how many times longer the slow one does.
PAUSE, TIMES = 1.0, 10
ROUNDS, BUFFER = 24, 9


@dataclass(frozen=True)
class Measured:
    """One run: seconds after its start and validation Dice at each commit, and what it came to."""

    seconds: tuple[float, ...]
    validation: tuple[float | None, ...]
    dice: float
    updates: int
    slow_updates: int
    total: float
    oldest: int
    mean_of_slow: float

    def until(self, dice: float) -> float | None:
        """Seconds until the median of three validations is as good."""
        known = [(at, value) for at, value in zip(self.seconds, self.validation, strict=True) if value is not None]
        for i in range(2, len(known)):
            if median([value for _, value in known[i - 2 : i + 1]]) >= dice:
                return known[i][0]
        return None


def run_of(study: Any, folder: Path, pause: float) -> Measured:
    """A run of the study, timed."""
    from async_task import SLOW, engine_of, sites_file
    from wardround.results.files import read_rounds
    from wardround.runs.conduct import coordinate
    from wardround.runs.watching import Silent

    commits: dict[int, float] = {}
    began = [0.0]

    class Clock(Silent):
        def arms(self, names: Sequence[str], rounds: int) -> None:
            began[0] = time.monotonic()

        def round(self, report: Any) -> None:
            commits.setdefault(report.round, time.monotonic() - began[0])

    sites = sites_file(folder / "lists")
    pauses = {site: pause * (TIMES if site == SLOW else 1) for site in study.sites}
    start = time.monotonic()
    with closing(engine_of(study, sites, folder, pauses)) as engine:
        result = coordinate(study, folder / "out", engine, watcher=Clock())
    lines = read_rounds(folder / "out")
    return Measured(
        seconds=tuple(commits[line.round] for line in lines),
        validation=tuple((line.validation or {}).get("dice") for line in lines),
        dice=result.metrics["federated"]["mean"]["dice"].value,
        updates=sum(len(line.participants) for line in lines),
        slow_updates=sum(SLOW in line.participants for line in lines),
        total=time.monotonic() - start,
        oldest=max((age for line in lines for age in line.staleness.values()), default=0),
        mean_of_slow=result.metrics["federated"][SLOW]["dice"].value,
    )


def counted(study: Any, folder: Path) -> float:
    """The test Dice of the study where training takes the slow site ten times as long, and no time passes."""
    import wardround
    from async_task import SITES, SLOW, Counted, sites_file
    from wardround.engines import local

    plain = local.LocalEngine
    durations = {site: float(TIMES if site == SLOW else 1) for site in SITES}
    if study.schedule.asynchronous is not None:
        local.LocalEngine = lambda find: Counted(plain(find), durations)  # type: ignore[assignment, misc]
    try:
        sites = sites_file(folder / "lists")
        result = wardround.run(study, sites, folder / "out", engine="local", quiet=True)
    finally:
        local.LocalEngine = plain  # type: ignore[misc]
    return float(result.metrics["federated"]["mean"]["dice"].value)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--out", type=Path, help="keep the runs here (default: a temporary folder)")
    parser.add_argument("--seeds", type=int, help="how many, the first of them timed (default: 5, quick: 1)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="synchronous rounds")
    parser.add_argument("--pause", type=float, default=PAUSE, help="seconds that a site sleeps in a step")
    options = parser.parse_args()
    need_images("lgg")
    logging.getLogger("wardround").setLevel(logging.ERROR)
    from async_task import BATCH, SITES, STEPS, study_of

    seeds = range(2026, 2026 + (options.seeds or (1 if options.quick else 5)))
    late = {"buffer": BUFFER, "exponent": 0.5, "max_staleness": 20}
    state = conditions(
        size="64x64", sites=len(SITES), seeds=list(seeds), pause=options.pause, times=TIMES, steps=STEPS, batch=BATCH,
        rounds=options.rounds, asynchronous=late, quick=options.quick,
    )  # fmt: skip
    more = math.ceil(options.rounds * len(SITES) / BUFFER)
    folder = options.out or Path(tempfile.mkdtemp(prefix="async-"))

    def studies(seed: int) -> dict[str, Any]:
        return {
            "synchronous": study_of(options.rounds, seed),
            "asynchronous": study_of(more, seed, asynchronous=late),
        }

    timed = {}
    for name, study in studies(seeds[0]).items():
        one = timed[name] = run_of(study, folder / f"{name}-{seeds[0]}", options.pause)
        print(f"{name}, seed {seeds[0]}: {one.seconds[-1]:.1f} s, Dice {one.dice:.4f}", flush=True)
    header = (
        "rounds",
        "seconds",
        "updates",
        "of the slow site",
        "oldest",
        "test Dice",
        "at the slow site",
        "with tests",
    )
    table(
        header,
        [
            (name, o.seconds[-1], o.updates, o.slow_updates, o.oldest, o.dice, o.mean_of_slow, o.total)
            for name, o in timed.items()
        ],
    )
    one, other = timed["synchronous"], timed["asynchronous"]
    dice = [(one.dice, other.dice)]
    for seed in seeds[1:]:
        first, second = (counted(study, folder / f"{name}-{seed}") for name, study in studies(seed).items())
        dice.append((first, second))
        print(f"seed {seed}, counted: Dice {first:.4f} synchronous, {second:.4f} asynchronous", flush=True)
    goal = [value for value in one.validation if value is not None][-1]
    to_goal = one.until(goal), other.until(goal)
    finish(
        {
            "synchronous_seconds": one.seconds[-1],
            "asynchronous_seconds": other.seconds[-1],
            "speedup": one.seconds[-1] / other.seconds[-1],
            "speedup_to_dice": None if None in to_goal else (to_goal[0] or 0.0) / (to_goal[1] or 1.0),
            "dice_gap": median([first - second for first, second in dice]),
            "dice": dice,
            "updates": [one.updates, other.updates],
            "speedup_with_tests": one.total / other.total,
            "conditions": state,
        }
    )
    if options.out is None:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
