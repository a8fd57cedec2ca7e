"""Which CT methods help, when every method meets FedAvg on its own network, and does a gain hold in another split?

*Methods*: each personalised method of ct_sites.py beside FedAvg on the very same network, with the same steps. A
hospital that did not train gets the mean of the private parts (`unseen: mean`; ct_sites.py has the initial ones).
*Splits*: the arms of ct_sites.py again with other seeds, which give other test patients, noise and initial values;
differences are of the same patients, and their spread over seeds says how much of them is chance.

Real slices, simulated scans; PSNR as in ct_sites.py. Nothing here was chosen on test patients.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import arguments, conditions, cpu_seconds, finish, need_images, table
from ct_sites import PLAIN, REST, UNSEEN, train

SEEDS = (2026, 2027, 2028)
MEAN = "unseen: mean"
BATCH_NORM = [*PLAIN, "model.norm=batch"]
REDCNN = ["model={kind: redcnn, conditioning: bottleneck}"]
TWO_BAND = ["model={kind: two_band}"]
IRADONMAP = ["model={kind: iradonmap}"]
# Network, method, and what they change in the study. FedAvg on the first two networks is in the other table.
METHODS: dict[tuple[str, str], list[str]] = {
    ("LEARN", "fedprox, mu 0.001"): [*PLAIN, "method={kind: fedprox, mu: 0.001}"],
    ("LEARN, conditioned", "hyperfed"): [f"method={{kind: hyperfed, {MEAN}}}"],
    ("LEARN, batch norm", "fedavg"): BATCH_NORM,
    ("LEARN, batch norm", "fedbn"): [*BATCH_NORM, f"method={{kind: fedbn, {MEAN}}}"],
    ("RED-CNN, bottleneck", "fedavg"): REDCNN,
    ("RED-CNN, bottleneck", "scan_physfed"): [*REDCNN, f"method={{kind: scan_physfed, {MEAN}}}"],
    ("two bands", "fedavg"): TWO_BAND,
    ("two bands", "fedfdd"): [*TWO_BAND, f"method={{kind: fedfdd, {MEAN}}}"],
    ("iRadonMAP", "fedavg"): IRADONMAP,
    ("iRadonMAP", "fedct"): [*IRADONMAP, f"method={{kind: fedct, {MEAN}}}"],
}


def psnr(metrics: dict[str, Any], arm: str, site: str = "mean") -> float:
    """An arm's PSNR in dB."""
    return float(metrics[arm][site]["psnr"]["value"])


def compare_methods(folder: Path, *, quick: bool) -> dict[str, dict[str, float]]:
    """PSNR of every method at every site; prints the table. Quick takes the small networks, never fewer steps."""
    rows: dict[str, dict[str, float]] = {}
    for (network, method), overrides in METHODS.items():
        if quick and network.startswith("LEARN"):
            continue
        name = f"{method}, {network}"
        where = folder / "".join(c if c.isalnum() else "_" for c in name)
        metrics = train(where, [*overrides, *REST], [])["metrics"]
        rows[name] = {site: psnr(metrics, "federated", site) for site in metrics["federated"] if site != "unseen"}
    columns = list(next(iter(rows.values())))
    print("\nPSNR on test patients, dB")
    table(["", *columns], [[name, *(row[site] for site in columns)] for name, row in rows.items()])
    return rows


def compare_splits(folder: Path, seeds: Sequence[int]) -> dict[str, dict[str, float]]:
    """What the conditioned network gains over every other arm, by seed; prints the table."""
    splits: dict[str, dict[int, float]] = {}
    for seed in seeds:
        chosen = [f"seed={seed}"]
        conditioned = train(folder / f"conditioned_{seed}", chosen, ["local", "pooled"])["metrics"]
        plain = train(folder / f"fedavg_{seed}", [*chosen, *PLAIN, *REST], [])["metrics"]
        gains = {
            f"conditioned over {arm}": psnr(conditioned, "federated") - psnr(conditioned, arm)
            for arm in ("fbp", "tv", "weighted_tv", "local", "pooled")
        }
        for site in ("mean", UNSEEN):
            ours, theirs = (psnr(metrics, "federated", site) for metrics in (conditioned, plain))
            gains[f"conditioned over fedavg, {site}"] = ours - theirs
        for name, gain in gains.items():
            splits.setdefault(name, {})[seed] = gain
    summary = {
        name: {
            "mean": statistics.fmean(by_seed.values()),
            **({"sd": statistics.stdev(by_seed.values())} if len(by_seed) > 1 else {}),
            **{str(seed): gain for seed, gain in by_seed.items()},
        }
        for name, by_seed in splits.items()
    }
    print(f"\ngain in dB, mean of the four hospitals, {len(seeds)} splits")
    table(["", *next(iter(summary.values()))], [[name, *row.values()] for name, row in summary.items()])
    return summary


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--part", choices=["methods", "splits"], help="only this half (default: both)")
    parser.add_argument("--out", type=Path, help="keep the runs here (default: a temporary folder)")
    options = parser.parse_args()
    need_images("luad-ct")
    seeds = SEEDS[:1] if options.quick else SEEDS
    state = conditions(size="128x128", seeds=list(seeds), quick=options.quick)
    folder = options.out or Path(tempfile.mkdtemp(prefix="ct-methods-"))
    began, cpu = time.perf_counter(), cpu_seconds()
    found: dict[str, Any] = {}
    if options.part in (None, "methods"):
        found["methods"] = compare_methods(folder, quick=options.quick)
    if options.part in (None, "splits"):
        found["splits"] = compare_splits(folder, seeds)
    finish({**found, "seconds": time.perf_counter() - began, "cpu_seconds": cpu_seconds() - cpu, "conditions": state})
    if options.out is None:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
