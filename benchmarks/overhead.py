"""What the federation costs beside the training: CPU seconds against a plain PyTorch loop, and two workers.

A MONAI UNet (16-32-64-128), 10 sites x 64 images of 128 x 128, batch 8, Adam. Each runner trains 4 rounds in a process
of its own; counted are rounds 2 to 4, from the end of the first to the end of the last, so imports, start-up and first
touches are excluded everywhere. Runners take turns; ratios are medians over the turns. Then the same of images against
MONAI: see overhead_images.py.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import arguments, conditions, finish, median, table
from overhead_images import ratios as image_ratios

SITES, STEPS, BATCH, ROUNDS, WARM = 10, 8, 8, 4, 1


def plain() -> dict[str, float]:
    """The loop anybody would write, on one thread."""
    import torch

    from overhead_task import UNetTask, site_images

    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = UNetTask()
    model = task.build_model()
    data = [site_images(n) for n in range(SITES)]
    state = copy.deepcopy(model.state_dict())
    marks = []
    for _ in range(ROUNDS):
        total = {name: torch.zeros_like(t) for name, t in state.items()}
        for site in data:
            model.load_state_dict(state)
            model.train()
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
            order = torch.randperm(len(site))
            for step in range(STEPS):
                rows = order[step * BATCH : (step + 1) * BATCH]
                optimizer.zero_grad(set_to_none=True)
                loss = task.loss(model, (site.images[rows], site.masks[rows]))
                loss.backward()
                optimizer.step()
            for name, tensor in model.state_dict().items():
                total[name] += tensor / SITES
        state = total
        marks.append((time.process_time(), time.perf_counter()))
    return _span(marks)


def ours(engine_name: str) -> dict[str, float]:
    """The same work as a study, on the local engine or on two workers."""
    from wardround.engines.local import LocalEngine
    from wardround.engines.workers import WorkersEngine
    from wardround.federation.coordinator import Coordinator
    from wardround.runs.machine import Machine
    from wardround.storage.journal import Journal
    from wardround.study.schema import Study
    from wardround.study.sites import SiteData, SitesFile

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        names = [f"S{n}" for n in range(SITES)]
        study = Study.model_validate(
            {
                "name": "overhead",
                "sites": {name: {} for name in names},
                "task": {"kind": "custom", "factory": "overhead_task:UNetTask"},
                "local": {"steps": STEPS, "batch": BATCH, "optimizer": "adam", "lr": 1e-3},
                "schedule": {"rounds": ROUNDS, "validate_every": 0, "release": "last"},
            }
        )
        sites = SitesFile(sites={n: SiteData(data=out) for n in names}).with_code()
        host = Machine(study, sites, out, ())
        if engine_name == "local":
            engine: Any = LocalEngine(host.find)
        else:
            spec = out / "spec.json"
            spec.write_text(json.dumps(host.spec()), encoding="utf-8")
            engine = WorkersEngine(2, "wardround.runs.machine:site_finder", spec)
        arm_spec = host.arm_spec("federated")
        coordinator = Coordinator(
            host.plan("federated"), arm_spec.method, engine, Journal(out / "arm", arm_spec.identity)
        )
        state = coordinator.start(
            lambda: arm_spec.method.initial(arm_spec.layout.groups, host.model_context.initial_values())
        )
        marks = [(time.process_time(), time.perf_counter()) for _ in coordinator.rounds(state)]
        engine.close()
    return _span(marks)


def _span(marks: list[tuple[float, float]]) -> dict[str, float]:
    (cpu0, wall0), (cpu1, wall1) = marks[WARM - 1], marks[-1]
    return {"cpu": cpu1 - cpu0, "wall": wall1 - wall0}


def _child(mode: str) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, __file__, "--child", mode], env=environment, check=True, capture_output=True, text=True
    )
    values: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return values


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--child", choices=["plain", "local", "workers"], help="internal: one runner in this process")
    options = parser.parse_args()
    if options.child:
        finish(plain() if options.child == "plain" else ours(options.child))
        return
    repeats = 3 if options.quick else 5
    state = conditions(sites=SITES, images=64, size="128x128", batch=BATCH, rounds=ROUNDS - WARM, repeats=repeats)
    runs: dict[str, list[dict[str, float]]] = {"plain": [], "local": [], "workers": []}
    for _ in range(repeats):
        for mode, found in runs.items():
            found.append(_child(mode))
    rows = [[m, median([r["cpu"] for r in found]), median([r["wall"] for r in found])] for m, found in runs.items()]
    table(["runner", "CPU s (its own process)", "wall s"], rows)
    ratios = [ours["cpu"] / base["cpu"] for ours, base in zip(runs["local"], runs["plain"], strict=True)]
    speedups = [base["wall"] / ours["wall"] for ours, base in zip(runs["workers"], runs["plain"], strict=True)]
    print("CPU ratios", [round(r, 3) for r in ratios], "speed-ups", [round(s, 2) for s in speedups])
    found = {"cpu_ratio": median(ratios), "workers_speedup": median(speedups)}
    finish(found | image_ratios(5 if options.quick else 9) | {"conditions": state})


if __name__ == "__main__":
    main()
