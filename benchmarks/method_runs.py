"""What benchmarks that compare methods share: finished runs that are not repeated, tuning, gains of the same seed.

A set is images of several hospitals as a study. Every method has settings, of which validation patients choose with
the first seed; FedAvg's are learning rates, and the others begin at the one that it chose. Then all seeds are run with
the setting chosen. Every finished run is a file in --out, and is not repeated.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy import stats

from common import arguments, cpu_seconds, engine_of, table

SEEDS = (1, 2, 3)
Values = dict[str, Any]
# In place of the study's learning rate, times it.
RATE = "rate"
BASE = "FedAvg"
# The numbers of a run: the method's setting, the rate that all begin with, and the seed.
Run = Callable[[str, Values, float, int], Values]


@dataclass(frozen=True)
class Method:
    """A kind of method: what every setting has, and its settings."""

    kind: str
    settings: tuple[Values, ...]
    common: Values = field(default_factory=dict)

    def section(self, setting: Values) -> Values:
        """`method` of the study with one of the settings."""
        return {"kind": self.kind, **self.common, **{k: v for k, v in setting.items() if k != RATE}}


@dataclass(frozen=True)
class Runs:
    """The runs of one set: `folder` holds those that are finished, `sites` says where the data lie.

    `training` are the sites whose mean counts, `unseen` one that does not train. No run begins after `ends`, on the
    clock of `time.monotonic`. Sites train in `processes` at once.
    """

    folder: Path
    sites: Any
    training: tuple[str, ...]
    unseen: str
    ends: float
    allow_code: bool = False
    processes: int = 1

    def finished(self, name: str, written: Values, notes: Values) -> Values:
        """The numbers of the study `written`, of a method `name`; made where there are none yet, with `notes`.

        Raises TimeoutError where they would have to be made and the time is up.
        """
        import wardround
        from wardround.study.hashes import study_sha256
        from wardround.study.load import load_study

        study = load_study(written)
        file = self.folder / f"{name}-{study_sha256(study)[:12]}.json"
        if file.exists():
            found: Values = json.loads(file.read_text(encoding="utf-8"))
            return found
        if time.monotonic() > self.ends:
            raise TimeoutError
        self.folder.mkdir(parents=True, exist_ok=True)
        folder = file.with_suffix("")
        began = cpu_seconds()
        # What a killed run left is gone on with; its seconds are then those of the rest.
        engine = engine_of(self.processes)
        result = wardround.run(study, self.sites, folder, quiet=True, allow_code=self.allow_code, **engine)
        first = result.metric_specs[0].name
        everywhere = (*self.training, self.unseen)
        sites = {site: result.metric("federated", site, first) for site in everywhere}
        values = {
            "mean": result.metric("federated", "mean", first),
            "worst_site": min(sites[site] for site in self.training),
            "unseen": sites[self.unseen],
            "bytes": result.traffic.bytes_up + result.traffic.bytes_down,
            "seconds": cpu_seconds() - began,
            "validation": _validation(result, first),
            "sites": sites,
            "method": written["method"],
            **notes,
            "selected_round": result.selected_round["federated"],
            "patients": result.patients,
        }
        file.write_text(json.dumps(values), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        print(f"{name} {notes}: mean {values['mean']:.3f}, {values['seconds']:.0f} s", flush=True)
        return values


def _validation(result: Any, metric: str) -> float:
    """What validation patients of the released round came to."""
    from wardround.results.files import read_rounds

    number = result.selected_round["federated"]
    found = [line.validation for line in read_rounds(result.out) if line.arm == "federated" and line.round == number]
    return float((found[0] or {}).get(metric, 0.0))


def tuned(run: Run, settings: Mapping[str, Sequence[Values]], *, quick: bool) -> Iterator[tuple[str, Values, float]]:
    """Every method with the setting, and the rate, that validation patients of the first seed prefer; FedAvg first."""
    rate = 1.0
    for name, known in settings.items():
        tried = known[:1] if quick else known
        found = [(run(name, setting, rate, SEEDS[0])["validation"], n) for n, setting in enumerate(tried)]
        best = known[max(found, key=lambda one: (one[0], -one[1]))[1]]
        yield name, best, rate
        if name == BASE:
            rate = best[RATE]


def of_seeds(run: Run, chosen: Sequence[tuple[str, Values, float]], lr: float, *, quick: bool) -> Values:
    """The figures of methods with the settings that were chosen; `lr` is the study's learning rate."""
    seeds = SEEDS[:1] if quick else SEEDS
    runs = {name: [run(name, setting, rate, seed) for seed in seeds] for name, setting, rate in chosen}
    return figures(runs, {name: {**s, "lr": lr * rate * s.get(RATE, 1.0)} for name, s, rate in chosen})


def figures(runs: Mapping[str, Sequence[Values]], chosen: Mapping[str, Values]) -> Values:
    """Means over seeds, and gains over FedAvg of the same seed with their spread."""
    base = runs[BASE]
    methods: dict[str, Values] = {}
    for name, of_method in runs.items():
        keys = ("mean", "worst_site", "unseen", "bytes", "seconds")
        found: Values = {key: statistics.fmean(run[key] for run in of_method) for key in keys}
        for key in keys[:3]:
            gains = [mine[key] - other[key] for mine, other in zip(of_method, base, strict=True)]
            found[f"{key}_gain"] = statistics.fmean(gains)
            found[f"{key}_gain_sd"] = statistics.stdev(gains) if len(gains) > 1 else None
        methods[name] = {**found, "setting": chosen[name]}
    return {"methods": methods, **best_of(methods)}


def best_of(methods: Mapping[str, Values]) -> Values:
    """The largest gains over FedAvg, whose they are, and whether they stand out of their spread over seeds."""
    others = {name: values for name, values in methods.items() if name != BASE}
    if not others:
        return {"best_gain_over_fedavg": None, "best_worst_site_gain": None}
    best = max(others, key=lambda name: others[name]["mean_gain"])
    worst = max(others, key=lambda name: others[name]["worst_site_gain"])
    return {
        "best_gain_over_fedavg": others[best]["mean_gain"],
        "best_method": best,
        "best_stands_out": _stands_out(others[best], "mean"),
        "best_worst_site_gain": others[worst]["worst_site_gain"],
        "best_worst_site_method": worst,
        "best_worst_site_stands_out": _stands_out(others[worst], "worst_site"),
    }


def _stands_out(values: Values, key: str) -> bool | None:
    """Whether the 95 % interval of a gain over seeds (Student's t) lies above 0; of one seed nothing is known."""
    spread, count = values.get(f"{key}_gain_sd"), len(SEEDS)
    if spread is None:
        return None
    reach = float(stats.t.ppf(0.975, count - 1)) * spread / count**0.5
    return bool(values[f"{key}_gain"] > max(0.0, reach))


def overall(sets: Mapping[str, Values]) -> Values:
    """Means over the sets, each of the same weight, of methods that all of them have; bytes and seconds add up."""
    first = next(iter(sets.values()))["methods"]
    methods: dict[str, Values] = {}
    for name in (name for name in first if all(name in found["methods"] for found in sets.values())):
        of_method = [found["methods"][name] for found in sets.values()]
        keys = ("mean", "worst_site", "unseen", "mean_gain", "worst_site_gain", "unseen_gain")
        methods[name] = {key: statistics.fmean(values[key] for values in of_method) for key in keys}
        methods[name] |= {key: sum(values[key] for values in of_method) for key in ("bytes", "seconds")}
    return {"methods": methods, **{k: v for k, v in best_of(methods).items() if not k.endswith("stands_out")}}


def report(name: str, found: Values) -> None:
    """A table, and in a sentence whether anything helped."""
    keys = ("mean", "mean_gain", "worst_site", "worst_site_gain", "unseen", "unseen_gain")
    rows = [
        [method, *(values[key] for key in keys), f"{values['bytes'] / 1e6:.1f} MB", f"{values['seconds']:.0f} s"]
        for method, values in found["methods"].items()
    ]
    print(f"\n{name}")
    table(["", "mean", "gain", "worst site", "gain", "unseen", "gain", "traffic", "CPU"], rows)
    if found["best_gain_over_fedavg"] is None:
        return
    best, gain, out = found["best_method"], found["best_gain_over_fedavg"], found.get("best_stands_out")
    if gain <= 0.0:
        print("no method is better than FedAvg on the mean of the sites")
    elif out is False:
        print(f"{best} is ahead of FedAvg, but its 95 % interval over seeds holds 0: no evidence that it helps")
    else:
        print(f"{best} is ahead of FedAvg by {gain:.3f} on the mean of the sites")


# The command line ----------------------------------------------------------------------------------------------------


def method_arguments(description: str, sets: Sequence[str], methods: Sequence[str]) -> argparse.ArgumentParser:
    """A parser with --out, --data, --methods and --minutes."""
    parser = arguments(description)
    parser.add_argument("--out", type=Path, help="keep finished runs here, and go on with them (default: temporary)")
    parser.add_argument("--data", help=f"only these sets: {','.join(sets)}")
    parser.add_argument("--methods", help=f"only these methods, FedAvg always: {','.join(methods)}")
    parser.add_argument("--minutes", type=float, default=150.0, help="begin no run after so many minutes")
    return parser


def chosen_methods(asked: str | None, methods: Mapping[str, Method]) -> list[str]:
    """The methods asked for, FedAvg first, of those that this version has."""
    from wardround.study.registry import BUILTIN

    names = asked.split(",") if asked else list(methods)
    if unknown := [name for name in names if name not in methods]:
        raise SystemExit(f"--methods {unknown[0]}: choose from {', '.join(methods)}")
    found = [name for name in methods if name in {BASE, *names} and methods[name].kind in BUILTIN["method"]]
    if lacking := [name for name in names if name not in found]:
        print(f"not in this version: {', '.join(lacking)}")
    return found


def out_folder(options: argparse.Namespace, prefix: str) -> Path:
    """Where finished runs are kept."""
    out = options.out or Path(tempfile.mkdtemp(prefix=prefix))
    out.mkdir(parents=True, exist_ok=True)
    return out


def of_sets(names: Sequence[str], of_set: Callable[[str], Values]) -> tuple[dict[str, Values], bool]:
    """The figures of every set whose runs are finished, printed, and whether that is true of all."""
    found: dict[str, Values] = {}
    for name in names:
        try:
            found[name] = of_set(name)
        except TimeoutError:
            print(f"{name}: the time is up; run the same command again to go on")
            continue
        report(name, found[name])
    if len(found) > 1:
        report("mean over the sets", overall(found))
    return found, len(found) == len(names)
