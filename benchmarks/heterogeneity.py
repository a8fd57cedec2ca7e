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

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import conditions, finish, need_images
from method_runs import (
    RATE,
    SEEDS,
    Runs,
    Values,
    chosen_methods,
    figures,
    method_arguments,
    of_seeds,
    of_sets,
    out_folder,
    overall,
    report,
    tuned,
)
from method_runs import Method as AnyMethod
from outlines import small_tumours

__all__ = ["DATA", "METHODS", "figures", "overall", "report", "settings_of"]
ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


@dataclass(frozen=True)
class Method(AnyMethod):
    """A kind of method; `images` are the settings of a set of images, where those of features are others."""

    images: tuple[Values, ...] | None = None
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

    def runs(self, data: Data) -> Runs:
        """The runs of a set."""
        folder = self.out / data.name
        return Runs(folder, self.sites(data), data.training, data.unseen, self.ends, allow_code=data.features)


def settings_of(method: Method, data: Data) -> tuple[Values, ...]:
    """The three settings of a method on a set."""
    return method.settings if data.features or method.images is None else method.images


def of_set(bench: Bench, data: Data, names: list[str]) -> Values:
    """The figures of one set of images."""
    runs = bench.runs(data)

    def run(name: str, setting: Values, rate: float, seed: int) -> Values:
        method, rate = METHODS[name], rate * setting.get(RATE, 1.0)
        section = method.section(setting)
        if method.head and data.head:
            section["head"] = list(data.head)
        written = data.study(section, rate, seed, bench.rounds(data))
        return runs.finished(name, written, {"rate": rate, "seed": seed})

    settings = {name: settings_of(METHODS[name], data) for name in names}
    chosen = list(tuned(run, settings, quick=bench.quick))
    return of_seeds(run, chosen, data.local["lr"], quick=bench.quick)


def main() -> None:
    parser = method_arguments(__doc__ or "", [data.name for data in DATA], list(METHODS))
    parser.add_argument("--weights", type=Path, help="for skin: what examples/efficientnet_lite_weights.py made")
    options = parser.parse_args()
    need_images("lgg, ham10000 and vessels")
    names = chosen_methods(options.methods, METHODS)
    only = options.data.split(",") if options.data else [data.name for data in DATA]
    sets = {data.name: data for data in DATA if data.name in only}
    out = out_folder(options, "heterogeneity-")
    finished = out / ("quick" if options.quick else "full")
    ends = time.monotonic() + 60.0 * options.minutes
    bench = Bench(finished, (out / "features").absolute(), options.weights, options.quick, ends)
    rounds = {name: bench.rounds(data) for name, data in sets.items()}
    state = conditions(seeds=SEEDS, rounds=rounds, quick=options.quick)
    found, complete = of_sets(list(sets), lambda name: of_set(bench, sets[name], names))
    finish({"data": found, **(overall(found) if found else {}), "complete": complete, "conditions": state})
    if options.out is None:
        shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
