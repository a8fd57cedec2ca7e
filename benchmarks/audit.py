"""What an audit finds: an attack that must work, the default study's updates, membership, and a privacy claim.

The positive control attacks single chest X-rays (PneumoniaMNIST) in a small network that is known to leak. Everything
else audits site CS of examples/lgg-mri.yaml at 64 x 64 with the default network, after a few rounds of training on
real heads with simulated acquisitions.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from common import arguments, conditions, finish, median, table

ROOT = Path(__file__).resolve().parent.parent
SITE = "CS"


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--out", type=Path, help="keep the run and the audit here (default: a temporary folder)")
    options = parser.parse_args()
    if "WARDROUND_DATA" not in os.environ:
        raise SystemExit("set WARDROUND_DATA to the folder that holds lgg/ and pneumoniamnist/")
    rounds = 1 if options.quick else 4
    state = conditions(size="64x64", control_size="32x32", seed=2026, rounds=rounds, site=SITE, quick=options.quick)
    began = time.process_time()

    import numpy as np
    import torch

    import wardround
    from wardround.audit.auditor import Effort
    from wardround.audit.command import audit
    from wardround.audit.epsilon import Claim
    from wardround.audit.inversion import ATTACKS, invert
    from wardround.audit.scores import score
    from wardround.audit.victims import control_victim
    from wardround.study.load import load_study
    from wardround.study.sites import load_sites

    torch.set_num_threads(1)
    effort = Effort.of(quick=options.quick)
    with np.load(Path(os.environ["WARDROUND_DATA"]) / "pneumoniamnist" / "pneumoniamnist.npz") as file:
        rays = torch.from_numpy(file["test_images"][: 2 if options.quick else 8].astype(np.float32) / 255.0)
    rows = []
    for attack in map(effort.limit, ATTACKS):
        victims = [control_victim(ray, number) for number, ray in enumerate(rays)]
        found = [score(invert(attack, v, n).images, v.images, None, v.images).ssim[0] for n, v in enumerate(victims)]
        rows.append([attack.name, median(found), min(found), len(found)])
    print("positive control: SSIM of chest X-rays, batch 1, no protection")
    table(["attack", "median", "least", "n"], rows)

    folder = options.out or Path(tempfile.mkdtemp(prefix="audit-"))
    study = load_study(
        ROOT / "examples" / "lgg-mri.yaml",
        [
            "task.size=[64,64]",
            "task.slices.per_patient=8",
            "task.evaluation.leave_one_out=false",
            "task.evaluation.baselines=[zero_filled]",
            "task.evaluation.slices.per_patient=2",
            "method.weights=samples",
            "local.steps=38",
            f"schedule.rounds={rounds}",
            "schedule.validate_every=4",
        ],
    )
    sites = load_sites(ROOT / "examples" / "lgg-sites.yaml")
    wardround.run(study, ROOT / "examples" / "lgg-sites.yaml", folder / "run", engine="local")
    trained = time.process_time() - began
    found_all = audit(
        study, sites, SITE, folder / "audit", model=folder / "run", quick=options.quick, claim=Claim(2.0, steps=10)
    )
    print(f"\n{SITE}: {found_all.light}: {found_all.verdict}")
    table(
        ["update", "attack", "n", "SSIM", "worst", "null", "recognised", "light"],
        [
            [r.variant, r.attack, r.images, r.ssim_median, r.ssim_worst, r.null_ssim, r.retrieved, r.light]
            for r in found_all.rows
        ],
    )
    print()
    table(
        ["membership", "n", "AUC", "control", "at 1 %", "at 0.1 %"],
        [
            [
                m.attack,
                f"{m.members}+{m.outsiders}",
                m.auc,
                "-" if m.control is None else m.control,
                m.at[0].tpr,
                m.at[1].tpr,
            ]
            for m in found_all.membership
        ],
    )
    for each in found_all.properties:
        print(f"property: {each.name}: AUC {each.auc:.3f} ({each.low:.3f} to {each.high:.3f}), n {each.examples}")
    print(found_all.epsilon)
    assert found_all.epsilon is not None
    finish(
        {
            "positive_control_ssim": max(row[1] for row in rows),
            "weakest_control_ssim": min(row[1] for row in rows),
            "default_ssim": max(r.ssim_worst for r in found_all.rows),
            "null_ssim": float(np.mean([r.null_ssim for r in found_all.rows])),
            "light": found_all.light,
            "membership_tpr_at_1pct": max(m.at[0].tpr for m in found_all.membership),
            "membership_control_auc": {m.attack: m.control for m in found_all.membership},
            "membership_n": [found_all.membership[0].members, found_all.membership[0].outsiders],
            "epsilon_claimed": found_all.epsilon.claimed,
            "epsilon_lower_bound": found_all.epsilon.lower,
            "cpu_seconds": time.process_time() - began,
            "conditions": {**state, "training_cpu_seconds": trained},
        }
    )


if __name__ == "__main__":
    main()
