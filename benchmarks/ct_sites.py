"""Hospitals with different CT scanners: does training together pay, and does it pay to tell the network the scanner?

Runs examples/luad-ct.yaml (one network, conditioned on the protocol) with all arms, and once for every other method.
The images are real slices; the scans are simulated from them. PSNR is of images cut off at -1024 and 3072 HU, its
range 4096 HU. `tv` trusts all rays alike, as is usual; `weighted_tv` weights them by their photons, as the network
does, and is the stricter comparison. Both are tuned on each hospital's validation patients, where it has any. The
unseen scanner sees the test patients of all hospitals: a geometry and dose that nobody trained on.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from common import arguments, conditions, cpu_seconds, finish, need_images, table
from wardround.results.schema import Result

ROOT = Path(__file__).resolve().parent.parent
UNSEEN = "NewScanner"
PLAIN = ["model.conditioned=false"]
# For every run but the one whose table has the baselines.
REST = ["task.evaluation.baselines=[]"]
# What each row changes in the study. The network of a method that needs parts of its own has those parts.
METHODS: dict[str, list[str]] = {
    "fedavg": PLAIN,
    "fedprox": [*PLAIN, "method={kind: fedprox, mu: 0.01}"],
    "fedbn": [*PLAIN, "method={kind: fedbn}", "model.norm=batch"],
    "hyperfed": ["method={kind: hyperfed}"],
    "scan_physfed": ["method={kind: scan_physfed}", "model={kind: redcnn, conditioning: bottleneck}"],
    "fedfdd": ["method={kind: fedfdd}", "model={kind: two_band}"],
    "fedct": ["method={kind: fedct}", "model={kind: iradonmap}"],
}
METRICS = ("psnr", "ssim", "rmse_hu", "psnr_lung", "psnr_soft")


def train(folder: Path, overrides: list[str], compare: list[str]) -> Result:
    """The result of one run of the example, with some changes."""
    import wardround

    since = time.perf_counter()
    result = wardround.run(
        ROOT / "examples" / "luad-ct.yaml",
        ROOT / "examples" / "luad-sites.yaml",
        folder,
        compare=compare,
        overrides=overrides,
    )
    print(f"{folder.name}: {time.perf_counter() - since:.0f} s", flush=True)
    return result


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--out", type=Path, help="keep the runs here (default: a temporary folder)")
    options = parser.parse_args()
    need_images("luad-ct")
    state = conditions(size="128x128", repeats=1, quick=options.quick)

    folder = options.out or Path(tempfile.mkdtemp(prefix="ct-sites-"))
    began, cpu = time.perf_counter(), cpu_seconds()

    conditioned = train(folder / "conditioned", [], ["local", "pooled"])
    # Quick leaves out methods, never a size.
    chosen = {"fedavg": PLAIN} if options.quick else METHODS
    others = {name: train(folder / name, [*overrides, *REST], []) for name, overrides in chosen.items()}
    seconds = time.perf_counter() - began

    metrics, training = conditioned.metrics, conditioned.participants
    columns = [*training, "mean", UNSEEN]
    print("patients:", {site: conditioned.patients[site] for site in [*training, UNSEEN]})
    rows: dict[str, dict[str, Any]] = {name: metrics[name] for name in ("fbp", "tv", "weighted_tv", "local", "pooled")}
    rows["conditioned"] = metrics["federated"]
    rows |= {name: values.metrics["federated"] for name, values in others.items()}
    summary: dict[str, dict[str, dict[str, float | None]]] = {}
    for metric in METRICS:
        print(f"\n{metric} on test patients")
        cells = {
            name: {site: row[site][metric].value if row.get(site) else None for site in columns}
            for name, row in rows.items()
        }
        table(["", *columns], [[name, *("-" if v is None else v for v in row.values())] for name, row in cells.items()])
        summary[metric] = cells

    def psnr(row: str, site: str = "mean") -> float:
        return float(rows[row][site]["psnr"].value)

    finish(
        {
            "fbp_psnr": psnr("fbp"),
            "tv_psnr": psnr("tv"),
            "local_psnr": psnr("local"),
            "fedavg_psnr": psnr("fedavg"),
            "conditioned_psnr": psnr("conditioned"),
            "pooled_psnr": psnr("pooled"),
            "gain_over_fbp_db": psnr("conditioned") - psnr("fbp"),
            "gain_over_tv_db": psnr("conditioned") - psnr("tv"),
            "gain_over_weighted_tv_db": psnr("conditioned") - psnr("weighted_tv"),
            "conditioned_gain_over_fedavg_db": psnr("conditioned") - psnr("fedavg"),
            "unseen_conditioned_gain_db": psnr("conditioned", UNSEEN) - psnr("fedavg", UNSEEN),
            "seconds": seconds,
            "cpu_seconds": cpu_seconds() - cpu,
            "table": summary["psnr"],
            "gains": {row: table["mean"]["psnr"].model_dump() for row, table in conditioned.gains["federated"].items()},
            "conditions": {
                **state,
                "study_sha256": conditioned.study_sha256,
                "selected_round": conditioned.selected_round,
                "steps": conditioned.steps,
                "patients": conditioned.patients,
            },
        }
    )
    if options.out is None:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
