"""What the demo shows and how long it takes: `wardround demo` in fresh processes, for fixed seeds.

Every seed draws its own phantoms (made-up patients, simulated acquisitions), split and simulation. The demo's settings
were chosen on phantoms of other seeds (docs/data.md).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from common import arguments, conditions, finish, median, table
from wardround.results.files import read_result
from wardround.results.schema import Table

SEEDS = (2026, 7, 11)
_ALONE, _TOGETHER, _TV = "local", "federated", "tv"
# Of the chain's two stages: the image, in dB, and the outline of the tumour.
_IMAGE, _OUTLINE = "psnr", "dice"


def measure_demo(seeds: Sequence[int] = SEEDS) -> dict[str, float]:
    """Run the demo once a seed; each run begins with nothing made.

    `demo_seconds` is the median wall time of the command. `demo_gain_over_alone_db` is the least mean PSNR of together
    minus alone, over training hospitals and seeds; `demo_gain_over_tv_db` of together minus total variation, over all
    hospitals, the unseen one too, and `demo_alone_over_tv_db` of alone minus total variation, over training hospitals.
    Of the tumours' Dice, together minus alone: `demo_gain_over_alone_dice`, its mean over hospitals and seeds, and
    `demo_worst_gain_over_alone_dice`, at one hospital. `METRIC/SEED/SITE/ARM` are PSNR, in dB, and Dice themselves.
    """
    seconds, found = [], {}
    for seed in seeds:
        took, metrics = _run(seed)
        seconds.append(took)
        found |= values_of(seed, metrics)
    return {"demo_seconds": median(seconds), **gains(found), **found}


def values_of(seed: int, metrics: Mapping[str, Table]) -> dict[str, float]:
    """The mean of every arm at every hospital, by `METRIC/SEED/SITE/ARM`, of the metrics in a result.json."""
    return {
        f"{metric}/{seed}/{site}/{arm}": estimate.value
        for metric in (_OUTLINE, _IMAGE)
        for arm, row in metrics.items()
        for site, cell in row.items()
        if arm != "baseline" and site not in ("mean", "unseen") and cell and (estimate := cell.get(metric)) is not None
    }


def gains(found: Mapping[str, float]) -> dict[str, float]:
    """The differences of arms; see `measure_demo`."""
    dice = _differences(found, _OUTLINE, _TOGETHER, _ALONE)
    figures = {
        "demo_gain_over_alone_db": min(_differences(found, _IMAGE, _TOGETHER, _ALONE)),
        "demo_gain_over_tv_db": min(_differences(found, _IMAGE, _TOGETHER, _TV)),
        "demo_alone_over_tv_db": min(_differences(found, _IMAGE, _ALONE, _TV)),
        "demo_gain_over_alone_dice": sum(dice) / len(dice),
        "demo_worst_gain_over_alone_dice": min(dice),
    }
    return {name: round(value, 3) for name, value in figures.items()}


def _differences(found: Mapping[str, float], metric: str, arm: str, reference: str) -> list[float]:
    """Of two arms, at every hospital where both have a value."""
    places = [k.removesuffix(arm) for k in found if k.startswith(f"{metric}/") and k.endswith(f"/{arm}")]
    return [found[place + arm] - found[place + reference] for place in places if place + reference in found]


def show(measured: Mapping[str, float]) -> None:
    """Print Dice and PSNRs, a row for every metric, seed and hospital."""
    keys = [key.split("/") for key in measured if "/" in key]
    arms = list(dict.fromkeys(key[-1] for key in keys))
    places = dict.fromkeys(tuple(key[:-1]) for key in keys)
    rows = [[*place, *(measured.get("/".join((*place, arm)), "-") for arm in arms)] for place in places]
    table(["metric", "seed", "hospital", *arms], rows)


def _run(seed: int) -> tuple[float, Mapping[str, Table]]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "demo"
        command = [sys.executable, "-m", "wardround", "demo", "--out", str(out), "--set", f"seed={seed}"]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        return seconds, read_result(out).metrics


def main() -> None:
    quick = arguments(__doc__ or "").parse_args().quick
    seeds = SEEDS[:1] if quick else SEEDS
    state = conditions(seeds=list(seeds))
    measured = measure_demo(seeds)
    show(measured)
    finish({**{key: value for key, value in measured.items() if "/" not in key}, "conditions": state})


if __name__ == "__main__":
    main()
