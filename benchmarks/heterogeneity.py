"""Hospitals are unlike: which method serves each of them better than FedAvg, and at what price?

Seven methods on three sets of real images: low-grade gliomas of three institutions (FLAIR and post-contrast T1 at
64 x 64), skin lesions of three sources (what a frozen encoder says of each picture), vessels of the retina of two
cohorts (patches of 128 x 128). An institution of each set does not train, and is served by the model that the method
has for a stranger. Every method has three settings, of which validation patients choose with one seed (FedAvg's three
are learning rates, and the others begin at the one that it chose); then three seeds are run with the setting chosen.
All methods see the same examples in the same number of rounds and steps of the common model.

`mean` is over training sites, `worst_site` the lowest of them, `unseen` the site that did not train: Dice, AUROC on
skin; bytes of messages and CPU seconds are of a run. Gains are against FedAvg of the same seed. Every finished run is a
file in --out, and is not repeated: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy import stats

from common import arguments, conditions, cpu_seconds, finish, need_images, table
from outlines import small_tumours

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
SEEDS = (1, 2, 3)
Values = dict[str, Any]
# In place of the study's learning rate, times it.
RATE = "rate"


@dataclass(frozen=True)
class Method:
    """A kind of method: what every setting has, and the three settings; `images` are those of a set of images."""

    kind: str
    settings: tuple[Values, Values, Values]
    common: Values = field(default_factory=dict)
    images: tuple[Values, Values, Values] | None = None
    head: bool = False


_RATES = ({RATE: 0.5}, {RATE: 1.0}, {RATE: 2.0})
METHODS = {
    "FedAvg": Method("fedavg", _RATES, {"weights": "equal"}),
    "FedProx": Method("fedprox", ({"mu": 0.001}, {"mu": 0.01}, {"mu": 0.1}), {"weights": "equal"}),
    "SCAFFOLD": Method("scaffold", _RATES),
    "FedBN": Method("fedbn", _RATES, {"weights": "equal", "unseen": "mean"}),
    "Ditto": Method("ditto", ({"pull": 0.03}, {"pull": 0.3}, {"pull": 3.0}), {"weights": "equal"}),
    "FedRep": Method(
        "fedrep", ({"head_steps": 2}, {"head_steps": 5}, {"head_steps": 10}), {"unseen": "mean"}, head=True
    ),
    "HarmoFL": Method(
        "harmofl",
        ({"alpha": 0.02}, {"alpha": 0.05}, {"alpha": 0.1}),
        images=(
            {"alpha": 0.05},
            {"alpha": 0.05, "amplitude": True},
            {"alpha": 0.1, "amplitude": True},
        ),
    ),
}


@dataclass(frozen=True)
class Data:
    """A set of images as a study; `unseen` is the site that does not train, `features` that the images are none."""

    name: str
    training: tuple[str, ...]
    unseen: str
    task: Values
    model: Values | None
    local: Values
    rounds: int
    folder: str
    features: bool = False
    head: tuple[str, ...] = ()

    def study(self, method: Values, rate: float, seed: int, rounds: int) -> Values:
        """The study of one run."""
        task = {**self.task, "options": {"seed": seed}} if self.features else self.task
        return {
            "name": f"heterogeneity-{self.name}",
            "seed": seed,
            "sites": {**{site: {} for site in self.training}, self.unseen: {"role": "unseen"}},
            "task": task,
            **({} if self.model is None else {"model": self.model}),
            "method": method,
            "local": {**self.local, "lr": self.local["lr"] * rate},
            "schedule": {"rounds": rounds, "validate_every": max(1, rounds // 4)},
        }


_LOCAL = {"steps": 10, "optimizer": "adam", "schedule": "cosine", "warmup": 20, "optimizer_state": "keep"}
_FLIPS = [{"name": "RandFlipd", "prob": 0.5, "spatial_axis": axis} for axis in (0, 1)]
DATA = (
    Data(
        "tumours",
        ("CS", "DU", "HT"),
        "FG",
        {**small_tumours(0.35), "augment": _FLIPS},
        {"kind": "monai_unet", "preset": "tiny", "norm": "batch"},
        {**_LOCAL, "batch": 8, "lr": 0.01},
        40,
        "lgg",
    ),
    Data(
        "skin",
        ("vidir_molemax", "vidir_modern", "vienna_dias"),
        "rosendahl",
        {"kind": "custom", "factory": "heterogeneity_task:make_task"},
        None,
        {**_LOCAL, "batch": 32, "lr": 0.001},
        20,
        "ham10000",
        features=True,
        head=("3.*",),
    ),
    Data(
        "vessels",
        ("DRIVE", "CHASEDB1"),
        "STARE",
        {
            "kind": "segmentation", "images": ["{patient}/{id}.jpg"], "mask": "{patient}/{id}_vessels", "channels": 3,
            "structures": {"vessels": "any"}, "resize": [224, 224], "patch": [128, 128], "patches_per_image": 2,
            "distances": "pixels", "augment": _FLIPS, "split": {"validation": 0.15, "test": 0.35},
        },
        {"kind": "segresnet", "preset": "tiny", "norm": "batch"},
        {**_LOCAL, "batch": 4, "lr": 0.01},
        15,
        "vessels",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """What a call runs: `out` holds finished runs, `features` those of skin, `quick` is a smoke of few rounds."""

    out: Path
    features: Path
    weights: Path | None
    quick: bool
    ends: float

    def rounds(self, data: Data) -> int:
        """Few in a smoke."""
        return 2 if self.quick else data.rounds

    def sites(self, data: Data) -> Any:
        """Where the sites' data lie."""
        from wardround.study.sites import SiteData, SitesFile, load_sites

        if not data.features:
            return load_sites(EXAMPLES / f"{data.folder}-sites.yaml")
        from heterogeneity_task import extract

        if self.weights is None and not (self.features / data.unseen).exists():
            raise SystemExit("give --weights FILE, made by examples/efficientnet_lite_weights.py, or leave skin out")
        if self.weights is not None:
            extract(EXAMPLES / "skin.yaml", EXAMPLES / "skin-sites.yaml", self.weights.absolute(), self.features)
        folders = {site: SiteData(data=self.features / site) for site in (*data.training, data.unseen)}
        return SitesFile(sites=folders).with_code()

    def run(self, data: Data, name: str, setting: Values, rate: float, seed: int) -> Values:
        """A finished run, made where there is none yet; its numbers."""
        import wardround
        from wardround.study.hashes import study_sha256
        from wardround.study.load import load_study

        method = METHODS[name]
        section = {"kind": method.kind, **method.common, **{k: v for k, v in setting.items() if k != RATE}}
        if method.head and data.head:
            section["head"] = list(data.head)
        study = load_study(data.study(section, rate * setting.get(RATE, 1.0), seed, self.rounds(data)))
        file = self.out / data.name / f"{name}-{study_sha256(study)[:12]}.json"
        if file.exists():
            found: Values = json.loads(file.read_text(encoding="utf-8"))
            return found
        if time.monotonic() > self.ends:
            raise TimeoutError
        folder = file.with_suffix("")
        began = cpu_seconds()
        # What a killed run left is gone on with; its seconds are then those of the rest.
        result = wardround.run(study, self.sites(data), folder, engine="local", quiet=True, allow_code=data.features)
        first = result.metric_specs[0].name
        values = {
            "mean": result.metric("federated", "mean", first),
            "worst_site": min(result.metric("federated", site, first) for site in data.training),
            "unseen": result.metric("federated", data.unseen, first),
            "bytes": result.traffic.bytes_up + result.traffic.bytes_down,
            "seconds": cpu_seconds() - began,
            "validation": _validation(result, first),
            "sites": {site: result.metric("federated", site, first) for site in (*data.training, data.unseen)},
            "method": section,
            "rate": rate * setting.get(RATE, 1.0),
            "seed": seed,
            "selected_round": result.selected_round["federated"],
            "patients": result.patients,
        }
        file.write_text(json.dumps(values), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        print(
            f"{data.name} {name} {setting} seed {seed}: mean {values['mean']:.3f}, {values['seconds']:.0f} s",
            flush=True,
        )
        return values


def _validation(result: Any, metric: str) -> float:
    """What validation patients of the released round came to."""
    from wardround.results.files import read_rounds

    number = result.selected_round["federated"]
    found = [line.validation for line in read_rounds(result.out) if line.arm == "federated" and line.round == number]
    return float((found[0] or {}).get(metric, 0.0))


def settings_of(method: Method, data: Data) -> tuple[Values, Values, Values]:
    """The three settings of a method on a set."""
    return method.settings if data.features or method.images is None else method.images


def tuned(bench: Bench, data: Data, names: Sequence[str]) -> Iterator[tuple[str, Values, float]]:
    """Every method with the setting, and the rate, that validation patients of the first seed prefer."""
    rate = 1.0
    for name in names:
        settings = settings_of(METHODS[name], data)
        tried = settings[:1] if bench.quick else settings
        found = [(bench.run(data, name, setting, rate, SEEDS[0])["validation"], n) for n, setting in enumerate(tried)]
        best = settings[max(found, key=lambda one: (one[0], -one[1]))[1]]
        yield name, best, rate
        if name == "FedAvg":
            rate = best[RATE]


def of_set(bench: Bench, data: Data, names: Sequence[str]) -> Values:
    """The figures of one set of images."""
    seeds = SEEDS[:1] if bench.quick else SEEDS
    runs: dict[str, list[Values]] = {}
    chosen: dict[str, Values] = {}
    for name, setting, rate in tuned(bench, data, names):
        runs[name] = [bench.run(data, name, setting, rate, seed) for seed in seeds]
        chosen[name] = {**setting, "lr": data.local["lr"] * rate * setting.get(RATE, 1.0)}
    return figures(runs, chosen)


def figures(runs: Mapping[str, Sequence[Values]], chosen: Mapping[str, Values]) -> Values:
    """Means over seeds, and gains over FedAvg of the same seed with their spread."""
    base = runs["FedAvg"]
    methods: dict[str, Values] = {}
    for name, of_method in runs.items():
        found = {key: statistics.fmean(run[key] for run in of_method) for key in ("mean", "worst_site", "unseen")}
        found |= {key: statistics.fmean(run[key] for run in of_method) for key in ("bytes", "seconds")}
        for key in ("mean", "worst_site", "unseen"):
            gains = [mine[key] - other[key] for mine, other in zip(of_method, base, strict=True)]
            found[f"{key}_gain"] = statistics.fmean(gains)
            found[f"{key}_gain_sd"] = statistics.stdev(gains) if len(gains) > 1 else None
        methods[name] = {**found, "setting": chosen[name]}
    return {"methods": methods, **best_of(methods)}


def best_of(methods: Mapping[str, Values]) -> Values:
    """The largest gains over FedAvg, whose they are, and whether they stand out of their spread over seeds."""
    others = {name: values for name, values in methods.items() if name != "FedAvg"}
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
    names = [name for name in METHODS if all(name in found["methods"] for found in sets.values())]
    methods: dict[str, Values] = {}
    for name in names:
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


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--out", type=Path, help="keep finished runs here, and go on with them (default: temporary)")
    parser.add_argument("--weights", type=Path, help="for skin: what examples/efficientnet_lite_weights.py made")
    parser.add_argument("--data", help="only these sets: tumours,skin,vessels")
    parser.add_argument("--methods", help="only these methods, FedAvg first: FedAvg,Ditto")
    parser.add_argument("--minutes", type=float, default=150.0, help="begin no run after so many minutes")
    options = parser.parse_args()
    need_images("lgg, ham10000 and vessels")
    names, sets = _chosen(options)
    out = options.out or Path(tempfile.mkdtemp(prefix="heterogeneity-"))
    out.mkdir(parents=True, exist_ok=True)
    finished = out / ("quick" if options.quick else "full")
    ends = time.monotonic() + 60.0 * options.minutes
    bench = Bench(finished, (out / "features").absolute(), options.weights, options.quick, ends)
    state = conditions(seeds=SEEDS, rounds={data.name: bench.rounds(data) for data in sets}, quick=options.quick)
    found: dict[str, Values] = {}
    complete = True
    for data in sets:
        (bench.out / data.name).mkdir(parents=True, exist_ok=True)
        try:
            found[data.name] = of_set(bench, data, names)
        except TimeoutError:
            print(f"{data.name}: the time is up; run the same command again to go on")
            complete = False
            continue
        report(data.name, found[data.name])
    if len(found) > 1:
        report("mean over the sets", overall(found))
    finish({"data": found, **(overall(found) if found else {}), "complete": complete, "conditions": state})
    if options.out is None:
        shutil.rmtree(out, ignore_errors=True)


def _chosen(options: argparse.Namespace) -> tuple[list[str], list[Data]]:
    """Methods, those that this version has, and sets."""
    from wardround.study.registry import BUILTIN

    asked = options.methods.split(",") if options.methods else list(METHODS)
    if unknown := [name for name in asked if name not in METHODS]:
        raise SystemExit(f"--methods {unknown[0]}: choose from {', '.join(METHODS)}")
    names = [name for name in METHODS if name in {"FedAvg", *asked} and METHODS[name].kind in BUILTIN["method"]]
    if lacking := [name for name in asked if name not in names]:
        print(f"not in this version: {', '.join(lacking)}")
    only = options.data.split(",") if options.data else [data.name for data in DATA]
    return names, [data for data in DATA if data.name in only]


if __name__ == "__main__":
    main()
