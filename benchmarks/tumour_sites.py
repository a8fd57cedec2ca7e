"""Five real institutions outline tumours: is training together worth it?

Runs examples/lgg-tumour.yaml with all arms: federated, each site alone, pooled, and each institution left out once
(--quick: one third of the rounds). Dice is of whole patients. Figures that average over sites weigh each site alike.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from common import arguments, conditions, finish, need_images, table

ROOT = Path(__file__).resolve().parent.parent
METRICS = ("dice", "hd95", "sensitivity", "volume_error")


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--out", type=Path, help="keep the run here (default: a temporary folder)")
    parser.add_argument("--without-left-out", action="store_true", help="do not train without each site once")
    options = parser.parse_args()
    need_images("lgg")
    state = conditions(size="128x128", seed=2026, repeats=1, quick=options.quick)

    import wardround

    folder = options.out or Path(tempfile.mkdtemp(prefix="tumour-sites-"))
    began = time.perf_counter()
    result = wardround.run(
        ROOT / "examples" / "lgg-tumour.yaml",
        ROOT / "examples" / "lgg-sites.yaml",
        folder,
        compare=["local", "pooled"],
        overrides=[
            f"task.leave_one_out={'false' if options.without_left_out else 'true'}",
            *(["schedule.rounds=20"] if options.quick else []),
        ],
    )
    seconds = time.perf_counter() - began
    metrics, training = result.metrics, result.participants
    columns = [*training, "EZ", "mean"]
    print("patients:", {site: result.patients[site] for site in columns if site != "mean"})
    for metric in METRICS:
        rows = []
        for arm in ("local", "federated", "pooled"):
            cells = [metrics[arm].get(site) for site in columns]
            rows.append([arm, *(cell[metric].value if cell and cell[metric] else "-" for cell in cells)])
        print(f"\n{metric} on test patients")
        table(["", *columns], rows)

    def dice(arm: str, site: str = "mean") -> float:
        return float(metrics[arm][site]["dice"].value)

    left_out = result.left_out
    unseen = {site: entry.federated["dice"].value for site, entry in left_out.items()}
    best = {site: entry.best_local["dice"].value for site, entry in left_out.items()}
    if unseen:
        print("\nleft out: Dice of the model trained without it, and of the best other site's own model")
        table(["", *unseen], [["trained without it", *unseen.values()], ["best local", *best.values()]])
    gains = {site: dice("federated", site) - dice("local", site) for site in training}
    finish(
        {
            "local_dice": dice("local"),
            "federated_dice": dice("federated"),
            "pooled_dice": dice("pooled"),
            "gain_over_local_dice": dice("federated") - dice("local"),
            "gap_to_pooled_dice": dice("pooled") - dice("federated"),
            "worst_site_gain_dice": min(gains.values()),
            "unseen_dice": sum(unseen.values()) / len(unseen) if unseen else None,
            "unseen_best_local_dice": sum(best.values()) / len(best) if best else None,
            "test_patients": sum(result.patients[site]["test"] for site in training),
            "seconds": seconds,
            "conditions": {**state, "selected_round": result.selected_round, "steps": result.steps},
        }
    )
    if options.out is None:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
