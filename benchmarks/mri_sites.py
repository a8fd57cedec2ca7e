"""Five real institutions: is training a reconstruction network together worth it?

Runs examples/lgg-transfer.yaml, scans of 1, 4, 8 and 12 coils with local phase, for 40 rounds, or with `--study
lgg-mri` examples/lgg-mri.yaml, 8 coils and smooth phase, with all arms: federated, each site alone, pooled, and each
institution left out once. The images are real; the acquisition is simulated from them. PSNR is of magnitude images, its
peak the volume's maximum.

Total variation is compared twice: of complex images (`tv`), and phase-constrained, of a real image (`tv_real`), which
is the assumption of a network with `image: real` and the stricter one where the phase is smooth (docs/baselines.md).
Both are tuned on the same validation patients. `gain_over_stricter_tv_db` is against the better of the two on the mean
of the sites. A run in --out that was stopped goes on with the same command.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from common import arguments, conditions, cpu_seconds, finish, need_images, table

ROOT = Path(__file__).resolve().parent.parent
# Whichever of them the study names itself.
BASELINES = ("zero_filled", "cg_sense", "tv", "tv_real")
# What differs from the example: fewer rounds, as there are two or more arms beside the federated one, and as much of
# every test patient as in lgg-mri.
CHANGES = {
    "lgg-mri": (),
    "lgg-transfer": (
        "schedule.rounds=40",
        "schedule.validate_every=20",
        "task.evaluation.slices.per_patient=6",
        "task.evaluation.tv_weights=[0.0005,0.001,0.002,0.004,0.008]",
        "task.evaluation.leave_one_out=true",
    ),
}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--out", type=Path, help="keep the run here, and go on with it (default: a temporary folder)")
    parser.add_argument("--study", choices=list(CHANGES), default="lgg-transfer", help="an example")
    parser.add_argument("--set", action="append", default=[], help="change the study, KEY=VALUE, to try the benchmark")
    options = parser.parse_args()
    need_images("lgg")
    state = conditions(
        study=options.study, size="128x128", seed=2026, repeats=1, quick=options.quick, changed=options.set
    )

    import wardround

    folder = options.out or Path(tempfile.mkdtemp(prefix="mri-sites-"))
    began, cpu = time.perf_counter(), cpu_seconds()
    result = wardround.run(
        ROOT / "examples" / f"{options.study}.yaml",
        ROOT / "examples" / "lgg-sites.yaml",
        folder,
        compare=["local", "pooled"],
        # Quick leaves out the left-out arms, never a size.
        overrides=[
            f"task.evaluation.baselines=[{','.join(BASELINES)}]",
            *CHANGES[options.study],
            *(["task.evaluation.leave_one_out=false"] if options.quick else []),
            *options.set,
        ],
    )
    seconds = time.perf_counter() - began
    metrics, training = result.metrics, result.participants
    columns = [*training, "EZ", "mean"]
    print("patients:", {site: result.patients[site] for site in columns if site != "mean"})
    for metric in ("psnr", "psnr_head", "ssim", "ssim_head"):
        rows = []
        for arm in (*BASELINES, "local", "federated", "pooled"):
            cells = [metrics[arm].get(site) for site in columns]
            rows.append([arm, *(cell[metric].value if cell else "-" for cell in cells)])
        print(f"\n{metric} on test patients")
        table(["", *columns], rows)

    def psnr(arm: str, site: str = "mean", metric: str = "psnr") -> float:
        return float(metrics[arm][site][metric].value)

    unseen = {
        site: entry.federated["psnr"].value - entry.best_local["psnr"].value for site, entry in result.left_out.items()
    }
    if unseen:
        print("\nleft out: trained without it, minus the best other site's own model (dB)")
        table(list(unseen), [list(unseen.values())])
    gains = {site: psnr("federated", site) - psnr("local", site) for site in training}
    stricter = max(("tv", "tv_real"), key=psnr)
    over_tv = {site: psnr("federated", site) - psnr(stricter, site) for site in training}
    finish(
        {
            "baseline_psnr": psnr("zero_filled"),
            "tv_psnr": psnr("tv"),
            "tv_real_psnr": psnr("tv_real"),
            "local_psnr": psnr("local"),
            "federated_psnr": psnr("federated"),
            "pooled_psnr": psnr("pooled"),
            "gain_over_baseline_db": psnr("federated") - psnr("zero_filled"),
            "gain_over_tv_db": psnr("federated") - psnr("tv"),
            "gain_over_tv_real_db": psnr("federated") - psnr("tv_real"),
            "stricter_tv": stricter,
            "gain_over_stricter_tv_db": psnr("federated") - psnr(stricter),
            "worst_site_gain_over_stricter_tv_db": min(over_tv.values()),
            "gap_to_pooled_db": psnr("pooled") - psnr("federated"),
            "worst_site_gain_over_local_db": min(gains.values()),
            "unseen_gain_over_best_local_db": sum(unseen.values()) / len(unseen) if unseen else None,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds() - cpu,
            "conditions": {**state, "selected_round": result.selected_round, "steps": result.steps},
        }
    )
    if options.out is None:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
