"""Sites without true images learn from held-out measured samples, or whole lines: how far behind true images are they?

    WARDROUND_DATA=/folder python benchmarks/self_supervision.py [--quick | --full] [--out FOLDER]

Three federations of one small network (`kind: cascade`, 12 channels, 300 steps a site) on simulated scans of four LGG
institutions (examples/lgg-transfer.yaml at 96 x 96, FLAIR alone, each site's own scanner): `images` learns from the
images that were scanned, `samples` from single samples that are held out (SSDU), `lines` from whole lines
(`supervision.held: lines`). The latter two choose their round by held-out samples too, and see no true image. PSNR in
dB is of magnitude images on test patients, from all that was measured; EZ trains nowhere. One seed. With --out the runs
are kept, and a second call goes on with them. --quick trains for 4 rounds of 5 steps: it says that it runs. The last
line is JSON.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from common import add_processes, conditions, cpu_seconds, engine_of, finish, kept_arguments, need_images, table

ROOT = Path(__file__).resolve().parent.parent
STUDY, SITES = ROOT / "examples/lgg-transfer.yaml", ROOT / "examples/lgg-sites.yaml"
TRAINING, UNSEEN = ("CS", "DU", "FG", "HT"), "EZ"
SIZE, ROUNDS, STEPS = 96, 20, 15
SPLIT = "task.supervision={kind: split, held: %s}"
ARMS = {"images": (), "samples": (SPLIT % "samples",), "lines": (SPLIT % "lines",)}
BASELINES = ("zero_filled", "tv")


def main() -> None:
    parser = kept_arguments(__doc__ or "")
    add_processes(parser)
    options = parser.parse_args()
    need_images("lgg")
    rounds, steps = (4, 5) if options.quick else (ROUNDS, STEPS)
    state = conditions(seed=2026, quick=options.quick, size=SIZE, rounds=rounds, steps=steps)
    folder = options.out or Path(tempfile.mkdtemp(prefix="self-supervision-"))

    import wardround

    found: dict[str, dict[str, float]] = {}
    for arm, changes in ARMS.items():
        began = cpu_seconds()
        overrides = [*settings(rounds, steps), *changes]
        result = wardround.run(STUDY, SITES, folder / arm, overrides=overrides, **engine_of(options.processes))
        if not found:
            found = {name: row(result, name) for name in BASELINES}
        found[arm] = {**row(result, "federated"), "round": result.selected_round, "seconds": cpu_seconds() - began}
    columns = ("mean", *TRAINING, UNSEEN)
    table(["PSNR, dB", *columns], [[name, *(values[column] for column in columns)] for name, values in found.items()])
    gaps = {f"{arm}_gap_to_images_db": found["images"]["mean"] - found[arm]["mean"] for arm in ("samples", "lines")}
    over_tv = {f"{arm}_gain_over_tv_db": found[arm]["mean"] - found["tv"]["mean"] for arm in ARMS}
    finish({"rows": found, **gaps, **over_tv, "conditions": state})
    if options.out is None:
        shutil.rmtree(folder, ignore_errors=True)


def settings(rounds: int, steps: int) -> list[str]:
    """What is changed of the study, for a network that is trained in minutes; images are what is measured against."""
    own = [f"sites.{site}.acquisition.reference=image" for site in (*TRAINING, UNSEEN)]
    one = [f"sites.{site}.acquisition.vary=null" for site in TRAINING]
    return [
        f"task.size=[{SIZE}, {SIZE}]",
        "task.contrasts=[flair]",
        f"task.evaluation.baselines=[{', '.join(BASELINES)}]",
        "model.channels=12",
        f"local.steps={steps}",
        f"schedule.rounds={rounds}",
        f"schedule.validate_every={max(1, rounds // 4)}",
        *own,
        *one,
    ]


def row(result: Any, arm: str) -> dict[str, float]:
    """PSNR of each site, and the mean of those that train."""
    found = {site: float(result.metric(arm, site, "psnr")) for site in (*TRAINING, UNSEEN)}
    return {**found, "mean": sum(found[site] for site in TRAINING) / len(TRAINING)}


if __name__ == "__main__":
    main()
