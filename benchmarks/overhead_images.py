"""What the federation costs beside the training of images: CPU seconds against loops as a MONAI user writes them.

Segmentation: a residual UNet (16-32-64-128) on slices of 128 x 128 of NIfTI volumes, Dice + cross-entropy.
Classification: a DenseNet (24, growth 12, blocks 3-6-12-8) on pictures of 3 x 128 x 128. Both: 4 sites x 32 images,
batch 4, a round goes twice over them (16 steps a site), Adam, the changes of `augment: standard`, one thread, no
evaluation.

The same network from the same weights, loss, optimiser, changes, number of steps and images; each side draws its own
order and changes. That they do the same is shown by a shorter run without random parts (batches of all images): `apart`
is the largest relative difference of a round's training loss, and `apart_by_order` that of the plain loop and itself
with its images in another order (Adam divides by the size of a gradient, so roundings of small ones grow). Each runner
trains 3 rounds in a process of its own; counted are rounds 2 and 3. Runners take turns; ratios are medians over the
turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import overhead_monai as monai_user
from common import arguments, conditions, finish, median, table
from overhead_monai import SAME, SEED, SIZE, Round, Work

WARM = 1
_TASKS: dict[str, dict[str, Any]] = {
    "segmentation": {
        "task": {"kind": "segmentation", "patch": [SIZE, SIZE], "loss": {"dice": 1.0, "cross_entropy": 1.0}},
        "model": {"kind": "monai_unet", "preset": "small", "norm": "batch"},
    },
    "classification": {
        "task": {
            "kind": "classification",
            "images": ["{id}"],
            "classes": list(monai_user.CLASSES),
            "size": [SIZE, SIZE],
        },
        "model": {"kind": "densenet", "preset": "small"},
    },
}


def ours(task: str, folder: Path, work: Work) -> list[Round]:
    """The work as a study, on the local engine."""
    from wardround.engines.local import LocalEngine
    from wardround.federation.coordinator import Coordinator
    from wardround.runs.machine import Machine
    from wardround.storage.journal import Journal
    from wardround.study.schema import Study
    from wardround.study.sites import SiteData, SitesFile

    parts = _TASKS[task]
    changes = {"augment": "standard" if work.augment else "none", "split": {"validation": 0.0, "test": 0.0}}
    study = Study.model_validate(
        {
            "name": "overhead",
            "seed": SEED,
            "sites": {name: {} for name in work.names},
            **parts,
            "task": parts["task"] | changes,
            "local": {"steps": work.steps, "batch": work.batch, "optimizer": "adam", "lr": 1e-3},
            "method": {"kind": "fedavg", "weights": "equal"},
            "schedule": {"rounds": work.rounds, "validate_every": 0, "release": "last"},
        }
    )
    with tempfile.TemporaryDirectory() as kept:
        out = Path(kept)
        host = Machine(study, SitesFile(sites={n: SiteData(data=folder / n) for n in work.names}), out, ())
        engine = LocalEngine(host.find)
        spec = host.arm_spec("federated")
        coordinator = Coordinator(host.plan("federated"), spec.method, engine, Journal(out / "arm", spec.identity))
        state = coordinator.start(lambda: spec.method.initial(spec.layout.groups, host.model_context.initial_values()))
        ended = [Round.ended(report.loss or 0.0) for report in coordinator.rounds(state)]
        engine.close()
    return ended


def _child(mode: str, task: str, folder: Path, work: Work, order: int = 0) -> list[Round]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _here(), monai_user.ORDER: str(order)}
    size = "same" if work == SAME else "whole"
    command = [sys.executable, __file__, "--child", mode, "--task", task, "--size", size, "--data", str(folder)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return [Round(*row) for row in json.loads(done.stdout.splitlines()[-1])["rounds"]]


def _here() -> str:
    return os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))))


def measured(task: str, repeats: int) -> dict[str, Any]:
    """Ratios of each turn, seconds, and how far losses are apart where nothing is random."""
    make = monai_user.make_volumes if task == "segmentation" else monai_user.make_pictures
    with tempfile.TemporaryDirectory() as few, tempfile.TemporaryDirectory() as all_:
        make(Path(few), SAME)
        make(Path(all_), Work())
        its = _child("monai", task, Path(few), SAME)
        apart = _apart(_child("ours", task, Path(few), SAME), its)
        by_order = _apart(_child("monai", task, Path(few), SAME, order=1), its)
        turns = [{mode: _child(mode, task, Path(all_), Work()) for mode in ("monai", "ours")} for _ in range(repeats)]
    cpu = {mode: [turn[mode][-1].cpu - turn[mode][WARM - 1].cpu for turn in turns] for mode in ("monai", "ours")}
    ratios = [mine / its for mine, its in zip(cpu["ours"], cpu["monai"], strict=True)]
    last = {mode: round(turns[0][mode][-1].loss, 3) for mode in ("monai", "ours")}
    rows = [[mode, median(seconds), last[mode]] for mode, seconds in cpu.items()]
    table([task, "CPU s (its own process)", "last training loss"], rows)
    print(
        f"CPU ratios {[round(r, 3) for r in ratios]}; losses without random parts apart by {apart:.1e}, {by_order:.1e}"
    )
    return {"ratio": median(ratios), "ratios": ratios, "apart": apart, "apart_by_order": by_order}


def _apart(ones: Sequence[Round], others: Sequence[Round]) -> float:
    return max(abs(one.loss / other.loss - 1.0) for one, other in zip(ones, others, strict=True))


def ratios(repeats: int) -> dict[str, Any]:
    """What this benchmark adds to the JSON of overhead.py."""
    found = {task: measured(task, repeats) for task in _TASKS}
    keys = {"ratio": "cpu_ratio", "ratios": "cpu_ratios", "apart": "apart", "apart_by_order": "apart_by_order"}
    return {f"{task}_{key}": found[task][name] for name, key in keys.items() for task in _TASKS}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--child", choices=["monai", "ours"], help="internal: one runner in this process")
    parser.add_argument("--task", choices=list(_TASKS), help="internal")
    parser.add_argument("--size", choices=["same", "whole"], help="internal")
    parser.add_argument("--data", type=Path, help="internal")
    options = parser.parse_args()
    if options.child:
        work = SAME if options.size == "same" else Work()
        plain = monai_user.segmentation if options.task == "segmentation" else monai_user.classification
        ended = plain(options.data, work) if options.child == "monai" else ours(options.task, options.data, work)
        finish({"rounds": [(each.cpu, each.wall, each.loss) for each in ended]})
        return
    repeats = 5 if options.quick else 9
    work = Work()
    state = conditions(sites=work.sites, images=work.images, batch=work.batch, steps=work.steps, repeats=repeats)
    finish(ratios(repeats) | {"conditions": state})


if __name__ == "__main__":
    main()
