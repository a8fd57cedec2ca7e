"""Five real institutions outline tumours: is training together worth it?

Runs examples/lgg-tumour.yaml with all arms: federated, each site alone, pooled, and each institution left out once
(--quick: one third of the rounds). Dice is of whole patients. Figures that average over sites weigh each site alike.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from common import arguments, conditions, finish, need_images

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
    from outlines import left_out_dice, mean_dice, print_arms

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
    training = result.participants
    print_arms(result, [*training, "EZ", "mean"], METRICS, "patients")
    unseen, best = left_out_dice(result)
    gains = {site: mean_dice(result, "federated", site) - mean_dice(result, "local", site) for site in training}
    finish(
        {
            "local_dice": mean_dice(result, "local"),
            "federated_dice": mean_dice(result, "federated"),
            "pooled_dice": mean_dice(result, "pooled"),
            "gain_over_local_dice": mean_dice(result, "federated") - mean_dice(result, "local"),
            "gap_to_pooled_dice": mean_dice(result, "pooled") - mean_dice(result, "federated"),
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
