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
_ALONE, _TOGETHER = "local", "federated"
_TV, _REAL_TV = "tv", "tv_real"


def measure_demo(seeds: Sequence[int] = SEEDS) -> dict[str, float]:
    """Run the demo once a seed; each run begins with nothing made.

    `demo_seconds` is the median wall time of the command. `demo_gain_over_alone_db` is the least mean PSNR of together
    minus alone, over training hospitals and seeds; `demo_gain_over_tv_db` of together minus total variation, over all
    hospitals, the unseen one too, and `demo_alone_over_tv_db` of alone minus total variation, over training hospitals.
    Against total variation of a real image (the network's own assumption), where the run has it:
    `demo_gain_over_tv_real_db`. `SEED/SITE/ARM` are the PSNRs themselves, in dB.
    """
    seconds, found = [], {}
    for seed in seeds:
        took, metrics = _run(seed)
        seconds.append(took)
        found |= psnrs(seed, metrics)
    return {"demo_seconds": median(seconds), **gains(found), **found}


def psnrs(seed: int, metrics: Mapping[str, Table]) -> dict[str, float]:
    """The mean PSNR of every arm at every hospital, by `SEED/SITE/ARM`, of the metrics in a result.json."""
    return {
        f"{seed}/{site}/{arm}": cell["psnr"].value
        for arm, row in metrics.items()
        for site, cell in row.items()
        if arm != "baseline" and site not in ("mean", "unseen") and cell
    }


def gains(found: Mapping[str, float]) -> dict[str, float]:
    """The least differences of arms; see `measure_demo`."""
    pairs = {
        "demo_gain_over_alone_db": (_TOGETHER, _ALONE),
        "demo_gain_over_tv_db": (_TOGETHER, _TV),
        "demo_alone_over_tv_db": (_ALONE, _TV),
        "demo_gain_over_tv_real_db": (_TOGETHER, _REAL_TV),
    }
    least = {}
    for name, (arm, reference) in pairs.items():
        places = [key.removesuffix(arm) for key in found if key.endswith(f"/{arm}")]
        differences = [found[p + arm] - found[p + reference] for p in places if p + reference in found]
        if differences:
            least[name] = round(min(differences), 3)
    return least


def show(measured: Mapping[str, float]) -> None:
    """Print the PSNRs, a row for every seed and hospital."""
    keys = [key.split("/") for key in measured if "/" in key]
    arms = list(dict.fromkeys(arm for _, _, arm in keys))
    places = dict.fromkeys((seed, site) for seed, site, _ in keys)
    rows = [[s, p, *(measured.get(f"{s}/{p}/{arm}", "-") for arm in arms)] for s, p in places]
    table(["seed", "hospital", *arms], rows)


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
