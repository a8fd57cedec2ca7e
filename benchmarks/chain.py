"""From k-space to the tumour mask at five institutions: does it pay to train both networks of the chain together?

The study is examples/lgg-chain.yaml: real FLAIR images and masks, k-space simulated from the images. For each
acceleration the hospitals train a reconstruction first. What follows starts from it and takes the same steps:

- separate: the segmenter alone, on the output of the reconstruction, which stays as it is
- joint: both networks by the weighted sum of their losses, the first one at a tenth of the rate, as it is trained
  already; validation patients choose one of several weights

A segmenter on zero-filled images and one on the images that were scanned (full) take those steps, too. The share
`headroom_recovered` is (joint - zero_filled) / (full - zero_filled), nothing where full is ahead by less than 0.01.
`gradient_ratio` is how many times as long the gradient of the outlines' loss in the trained first network is as that of
the images' loss, the median of four batches of each site.
The interval of the gain is of paired differences of test patients, each training site with the same weight: it holds
the chance of which patients were tested, not that of another seed. The weight chosen at the first acceleration serves
at the second.

    WARDROUND_DATA=/folder python benchmarks/chain.py [--quick | --full] [--rounds FIRST SECOND] [--accelerations 8 4]
        [--out FOLDER]
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import arguments, conditions, cpu_seconds, finish, need_images, table
from wardround.results.files import read_rounds
from wardround.results.schema import Result

ROOT = Path(__file__).resolve().parent.parent
STUDY, SITES = ROOT / "examples" / "lgg-chain.yaml", ROOT / "examples" / "lgg-sites.yaml"
ACCELERATIONS = (8, 4)
# Of the loss of the images, beside 1 of the outlines', whose gradient in the first network is some 100 times as long
# (`gradient_ratio`).
WEIGHTS = (10.0, 100.0, 1000.0)
# Of the learning rate, for the first network in the joint phase: at all of it, it forgets what it learned alone.
RATE = 0.1
# Rounds of the reconstruction alone, and of what follows: of the full benchmark and the quick one.
ROUNDS, QUICK = (20, 40), (8, 12)
SEEDS = (2026,)
ONLY = "{train: [diagnosis]}"
# Of each site, for the ratio of gradients.
BATCHES = 4
NOTHING = 0.01


@dataclass(frozen=True)
class Bench:
    """Where the runs go, and how long they are."""

    folder: Path
    first: int
    second: int
    seed: int

    def run(self, name: str, acceleration: int, rounds: int, phase: str, *more: str) -> Result:
        """The result of one run of the example, with some changes; `name` is its folder."""
        import wardround

        since = time.perf_counter()
        # The rate falls to 0, so the last round is the one to release, and validation patients choose weights alone.
        schedule = f"{{rounds: {rounds}, min_sites: 2, validate_every: {rounds}, release: last, phases: [{phase}]}}"
        overrides = [
            f"seed={self.seed}",
            f"acquisition.mask.acceleration={acceleration}",
            f"schedule={schedule}",
            *more,
        ]
        result = wardround.run(STUDY, SITES, self.folder / name, overrides=overrides, near=self.folder)
        print(f"{name}: {time.perf_counter() - since:.0f} s", flush=True)
        return result

    def reconstruction(self, acceleration: int) -> Result:
        """The first network alone."""
        return self.run(f"{acceleration}x-first", acceleration, self.first, "{train: [reconstruction]}")

    def follows(self, name: str, acceleration: int, phase: str, begun: Result) -> Result:
        """What starts from a trained reconstruction; batch norm's counters are no part of a release."""
        start = f"{{kind: release, file: {acceleration}x-first, sha256: {begun.model_sha256}, partial: true}}"
        return self.run(f"{acceleration}x-{name}", acceleration, self.second, phase, f"start={start}")

    def compared(self, name: str, acceleration: int, seen: str) -> Result:
        """A segmenter on other images."""
        return self.run(f"{acceleration}x-{name}", acceleration, self.second, ONLY, f"task.seen={seen}")


def validation_dice(folder: Path, result: Result) -> float:
    """Of the last round, over all sites' validation patients."""
    (line,) = (r for r in read_rounds(folder) if r.arm == "federated" and r.round == result.rounds)
    return float(line.validation["dice"]) if line.validation else float("nan")


def opened(out: Path) -> tuple[Any, Any, dict[str, Any]]:
    """The study of a run, its task, and the values of its released model."""
    from safetensors.torch import load_file

    from wardround.study.load import load_study
    from wardround.tasks.build import build_task

    study = load_study(out / "study.yaml")
    return study, build_task(study), load_file(out / "models" / "federated.safetensors")


def tested_dice(out: Path) -> dict[str, list[float]]:
    """Dice of each test patient of the training sites by the released model, NaN without a tumour."""
    import torch

    from wardround.study.sites import load_sites

    torch.set_num_threads(1)
    (study, task, values), sites = opened(out), load_sites(SITES)

    def of(site: str) -> list[float]:
        model = task.build_model()
        model.load_state_dict(values)
        model.eval()
        batches = task.dataset(site, sites.of(site).data).evaluation("test")
        return [float(task.score(model, batch)["dice"]) for _, batch in batches]

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(zip(study.training_sites, pool.map(of, study.training_sites), strict=True))


def gradient_ratio(out: Path) -> float:
    """How many times as long the outlines' gradient in the first network is as the images'; median over batches."""
    import numpy as np
    import torch

    from wardround.study.sites import load_sites

    (study, task, values), sites = opened(out), load_sites(SITES)
    model = task.build_model()
    model.load_state_dict(values)
    model.train()
    first, found = list(model.get_submodule("reconstruction").parameters()), []
    for site in study.training_sites:
        data, random = task.dataset(site, sites.of(site).data), np.random.default_rng(0)
        for _ in range(BATCHES):
            losses = task.losses(model, data.batch(random.integers(0, len(data), study.local.batch).tolist(), random))
            lengths = {}
            for stage, loss in losses.items():
                gradients = torch.autograd.grad(loss, first, retain_graph=True, allow_unused=True)
                lengths[stage] = sum(float(g.square().sum()) for g in gradients if g is not None) ** 0.5
            found.append(lengths["diagnosis"] / lengths["reconstruction"])
    return float(np.median(found))


def paired(ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]]) -> tuple[float, float, float]:
    """Mean difference with the ends of its 95% interval: patients within a site, sites alike (Student's t)."""
    import numpy as np
    from scipy.stats import t

    means, squares, patients = [], [], 0
    for site in ours:
        differences = np.asarray(ours[site]) - np.asarray(theirs[site])
        differences = differences[np.isfinite(differences)]
        means.append(differences.mean())
        squares.append(differences.var(ddof=1) / len(differences))
        patients += len(differences)
    mean, error = float(np.mean(means)), float(np.sqrt(np.sum(squares)) / len(means))
    reach = float(t.ppf(0.975, patients - len(means))) * error
    return mean, mean - reach, mean + reach


def value(result: Result, metric: str, row: str = "federated") -> float:
    """Of the mean over training sites."""
    return float(result.metric(row, "mean", metric))


def at(bench: Bench, acceleration: int, weights: Sequence[float]) -> dict[str, Any]:
    """Everything at one acceleration, the joint chain with the best of several weights."""
    begun = bench.reconstruction(acceleration)
    zero_filled = bench.compared("zero-filled", acceleration, "zero_filled")
    separate = bench.follows("separate", acceleration, ONLY, begun)
    tried: dict[float, Result] = {}
    for weight in weights:
        weighed = f"weights: {{reconstruction: {weight}, diagnosis: 1}}, rates: {{reconstruction: {RATE}}}"
        phase = f"{{train: [reconstruction, diagnosis], {weighed}}}"
        tried[weight] = bench.follows(f"joint-{weight:g}", acceleration, phase, begun)
    folders = {weight: bench.folder / f"{acceleration}x-joint-{weight:g}" for weight in tried}
    validated = {weight: validation_dice(folders[weight], result) for weight, result in tried.items()}
    chosen = max(validated, key=lambda weight: validated[weight])
    joint = tried[chosen]
    gain, low, high = paired(tested_dice(folders[chosen]), tested_dice(bench.folder / f"{acceleration}x-separate"))
    return {
        "zero_filled_dice": value(zero_filled, "dice"),
        "separate_dice": value(separate, "dice"),
        "joint_dice": value(joint, "dice"),
        "joint_gain_dice": gain,
        "joint_gain_ci_low": low,
        "joint_gain_ci_high": high,
        "zero_filled_psnr": value(zero_filled, "psnr"),
        "separate_psnr": value(separate, "psnr"),
        "joint_psnr": value(joint, "psnr"),
        "weight": chosen,
        "gradient_ratio": gradient_ratio(bench.folder / f"{acceleration}x-separate"),
        "validation_dice": {f"{weight:g}": found for weight, found in validated.items()},
        "test_dice_of_weights": {f"{weight:g}": value(result, "dice") for weight, result in tried.items()},
    }


def recovered(full: float, found: Mapping[str, Any]) -> float | None:
    """The share of what undersampling cost that the joint chain won back."""
    headroom = full - found["zero_filled_dice"]
    return (found["joint_dice"] - found["zero_filled_dice"]) / headroom if headroom >= NOTHING else None


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--rounds", type=int, nargs=2, metavar=("FIRST", "SECOND"), help="of both parts of training")
    parser.add_argument("--accelerations", type=int, nargs="+", default=ACCELERATIONS, help="the JSON is of the first")
    parser.add_argument("--out", type=Path, help="keep the runs here (default: a temporary folder)")
    options = parser.parse_args()
    need_images("lgg")
    first, second = options.rounds or (QUICK if options.quick else ROUNDS)
    state = conditions(
        size="128x128",
        seeds=list(SEEDS),
        repeats=1,
        quick=options.quick,
        rounds=[first, second],
        weights=list(WEIGHTS),
        rate=RATE,
    )
    accelerations: Sequence[int] = options.accelerations

    folder = options.out or Path(tempfile.mkdtemp(prefix="chain-"))
    folder.mkdir(parents=True, exist_ok=True)
    began, cpu = time.perf_counter(), cpu_seconds()
    bench = Bench(folder.resolve(), first, second, SEEDS[0])
    full = bench.compared("full", accelerations[0], "full")
    full_dice, found = value(full, "dice"), {}
    weights: Sequence[float] = WEIGHTS
    # Quick leaves out the second acceleration and shortens training, never a size.
    for acceleration in accelerations[:1] if options.quick else accelerations:
        found[acceleration] = at(bench, acceleration, weights)
        weights = (found[acceleration]["weight"],)
    seconds = time.perf_counter() - began

    print("test patients:", {site: counts["test"] for site, counts in full.patients.items() if counts})
    names = ("zero_filled", "separate", "joint")
    rows = [
        [f"{acceleration}x {name}", row[f"{name}_dice"], row[f"{name}_psnr"]]
        for acceleration, row in found.items()
        for name in names
    ]
    table(["", "Dice", "PSNR (dB)"], [["full", full_dice, "-"], *rows])
    hard = found[accelerations[0]]
    finish(
        {
            "full_dice": full_dice,
            **{f"{name}_dice": hard[f"{name}_dice"] for name in names},
            "joint_gain_dice": hard["joint_gain_dice"],
            "joint_gain_ci_low": hard["joint_gain_ci_low"],
            "joint_gain_ci_high": hard["joint_gain_ci_high"],
            "headroom_recovered": recovered(full_dice, hard),
            "seconds": seconds,
            "cpu_seconds": cpu_seconds() - cpu,
            "table": {f"{a}x": {**row, "headroom_recovered": recovered(full_dice, row)} for a, row in found.items()},
            "conditions": {**state, "patients": full.patients, "study_sha256": full.study_sha256},
        }
    )
    if options.out is None:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
