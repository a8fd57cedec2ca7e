"""Three cohorts of three countries outline the vessels of the retina: does a fourth gain from training together?

Runs examples/vessels.yaml with all arms: federated, each cohort alone, pooled, and each cohort left out once (--quick:
one third of the rounds). Dice is of whole pictures. Figures that average over cohorts weigh each cohort alike.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from common import arguments, conditions, finish, need_images

ROOT = Path(__file__).resolve().parent.parent
METRICS = ("dice", "sensitivity")


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--out", type=Path, help="keep the run here (default: a temporary folder)")
    options = parser.parse_args()
    need_images("vessels")
    state = conditions(size="whole pictures of 519 to 584 x 565 to 600", seed=2026, repeats=1, quick=options.quick)

    import wardround
    from outlines import left_out_dice, mean_dice, print_arms

    folder = options.out or Path(tempfile.mkdtemp(prefix="vessel-sites-"))
    began = time.perf_counter()
    result = wardround.run(
        ROOT / "examples" / "vessels.yaml",
        ROOT / "examples" / "vessels-sites.yaml",
        folder,
        compare=["local", "pooled"],
        overrides=["schedule.rounds=10"] if options.quick else [],
    )
    seconds = time.perf_counter() - began
    cohorts = result.participants
    print_arms(result, [*cohorts, "mean"], METRICS, "persons")
    unseen, best = left_out_dice(result)
    unseen_dice, best_local = sum(unseen.values()) / len(unseen), sum(best.values()) / len(best)
    finish(
        {
            "local_dice": mean_dice(result, "local"),
            "federated_dice": mean_dice(result, "federated"),
            "pooled_dice": mean_dice(result, "pooled"),
            "unseen_dice": unseen_dice,
            "unseen_best_local_dice": best_local,
            "unseen_gain_dice": unseen_dice - best_local,
            "unseen_gain_dice_by_cohort": {cohort: unseen[cohort] - best[cohort] for cohort in unseen},
            "test_persons": sum(result.patients[cohort]["test"] for cohort in cohorts),
            "seconds": seconds,
            "conditions": {**state, "selected_round": result.selected_round, "steps": result.steps},
        }
    )
    if options.out is None:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
