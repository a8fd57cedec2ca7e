"""A released reconstruction network meets scans unlike its training: does learning from each scan's own samples help?

    WARDROUND_DATA=/folder python benchmarks/adapt_scan.py [--quick | --full] [--out FOLDER]

Trains two small networks by federation on simulated scans of four LGG institutions (examples/lgg-transfer.yaml at
96 x 96, FLAIR alone, 12 channels, 600 steps): `narrow` sees one scanner a site, `varied` sees what
`acquisition.vary` draws. Then one test patient of each institution is scanned by the institution's own scanner
(`usual`) and by scanners that neither network saw: four times the noise (`noise`), strong local phase and unlike coils
(`phase`), 7x instead of 4x (`lines`). Two slices of a patient are a volume, to which the network is adapted by at most
40 steps, as `wardround reconstruct --adapt-to-scan 40` does (`wardround.learning.scan_fit`), and reconstructed. PSNR is
of magnitude images against the image that was scanned. Total variation with the study's middle weight stands beside.

Whole lines are set apart since single samples made images of some of these patients worse. With --out the networks are
kept, and a second call goes on with them. --quick trains for 4 rounds and takes one patient: it says that it runs. The
last line is JSON.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from common import arguments, conditions, cpu_seconds, finish, need_images, released, table

ROOT = Path(__file__).resolve().parent.parent
STUDY, SITES = ROOT / "examples/lgg-transfer.yaml", ROOT / "examples/lgg-sites.yaml"
TRAINING = ("CS", "DU", "FG", "HT")
SIZE, SLICES, STEPS, ROUNDS = 96, 2, 40, 10
#: What is unlike training, of every institution's scanner.
SCANNERS: Mapping[str, Mapping[str, Any]] = {
    "usual": {},
    "noise": {"noise": 0.02},
    "phase": {"phase": 6.0, "phase_detail": 1.6, "coil_variety": 0.6},
    "lines": {"mask.acceleration": 7},
}


@dataclass(frozen=True)
class Adapted:
    """PSNR in dB of a patient's slices, before and after adapting, and of total variation; and what the steps cost."""

    before: float
    after: float
    tv: float
    fit: Any
    cpu_seconds: float


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--out", type=Path, help="keep the networks here, and go on with those that are there")
    options = parser.parse_args()
    need_images("lgg")
    rounds, sites = (4, TRAINING[1:2]) if options.quick else (ROUNDS, TRAINING)
    state = conditions(
        seed=2026, quick=options.quick, size=SIZE, slices=SLICES, steps=STEPS, rounds=rounds, patients=len(sites)
    )
    import torch

    torch.set_num_threads(1)
    folder = options.out or Path(tempfile.mkdtemp(prefix="adapt-scan-"))
    began = cpu_seconds()
    found: dict[str, dict[str, list[Adapted]]] = {}
    for name in ("narrow", "varied"):
        network, study = released(trained(folder / name, name, rounds))
        found[name] = {
            scanner: [adapted(network, study, volume(site, scanner)) for site in sites] for scanner in SCANNERS
        }
        show(name, found[name])
    finish(
        {
            **{
                f"{name}_{scanner}_gain_db": fmean(one.after - one.before for one in rows)
                for name, scanners in found.items()
                for scanner, rows in scanners.items()
            },
            "worst_gain_db": min(
                one.after - one.before for scanners in found.values() for rows in scanners.values() for one in rows
            ),
            "cases": {
                name: {scanner: [asdict(one) for one in rows] for scanner, rows in scanners.items()}
                for name, scanners in found.items()
            },
            "cpu_seconds": cpu_seconds() - began,
            "conditions": state,
        }
    )
    if options.out is None:
        shutil.rmtree(folder, ignore_errors=True)


def settings(rounds: int) -> list[str]:
    """What is changed of the study, for a network that is trained in minutes."""
    return [
        f"task.size=[{SIZE}, {SIZE}]",
        "task.contrasts=[flair]",
        "task.evaluation.baselines=[zero_filled]",
        "model.channels=12",
        f"schedule.rounds={rounds}",
        f"schedule.validate_every={rounds}",
    ]


def trained(folder: Path, name: str, rounds: int) -> Path:
    """The released network of a federation; a run that was stopped goes on."""
    import wardround

    path = folder / "models" / "federated.safetensors"
    if not (folder / "result.json").exists():
        one = [f"sites.{site}.acquisition.vary=null" for site in TRAINING] if name == "narrow" else []
        wardround.run(STUDY, SITES, folder, overrides=[*settings(rounds), *one], engine="local", quiet=True)
    return path


def volume(site: str, scanner: str) -> list[Any]:
    """The slices of a site's first test patient, each a batch of one, as a scanner measures them."""
    from wardround.study.load import load_study
    from wardround.study.sites import load_sites
    from wardround.tasks.build import build_task

    changes = {**SCANNERS[scanner], "reference": "image"}
    overrides = [
        *settings(1),
        *(f"task.evaluation.{key}={SLICES}" for key in ("slices.per_patient", "tuning_slices")),
        *(f"sites.{site}.acquisition.{key}={value}" for key, value in changes.items()),
    ]
    task: Any = build_task(load_study(STUDY, overrides))
    _, batch = next(task.dataset(site, load_sites(SITES).sites[site].data).evaluation("test"))
    return [batch.part(number, number + 1) for number in range(len(batch))]


def adapted(network: Any, study: Any, slices: Sequence[Any]) -> Adapted:
    """The volume reconstructed by the released network, by one adapted to it, and by total variation."""
    from wardround.runs.adapting import adapted as adapt
    from wardround.runs.adapting import splitting
    from wardround.runs.depth import total_variation

    scans = [lambda one=one: (one.operator, one.kspace) for one in slices]
    began = cpu_seconds()
    fitted, fit = adapt(network, scans, splitting(study, None), STEPS, study.seed)
    seconds = cpu_seconds() - began
    psnr = [fmean(scores(method, slices)) for method in (network, fitted, total_variation(study))]
    return Adapted(*psnr, fit=fit, cpu_seconds=seconds)


def scores(method: Any, slices: Sequence[Any]) -> Iterator[float]:
    """PSNR of each slice."""
    import torch

    from wardround.tasks.metrics import psnr

    for one in slices:
        with torch.no_grad():
            yield float(psnr(method(one.operator, one.kspace).abs(), one.target))


def show(name: str, found: Mapping[str, Sequence[Adapted]]) -> None:
    """A table of means over patients."""
    print(f"\n{name}: PSNR in dB, mean over patients")
    header = ("", "released", "adapted", "gain", "worst gain", "tv", "held out before", "after", "step", "CPU s")
    rows = []
    for scanner, each in found.items():
        gains = [one.after - one.before for one in each]
        rows.append(
            [
                scanner,
                *(fmean(getattr(one, key) for one in each) for key in ("before", "after")),
                fmean(gains),
                min(gains),
                fmean(one.tv for one in each),
                *(fmean(getattr(one.fit, key) for one in each) for key in ("before", "after", "kept")),
                fmean(one.cpu_seconds for one in each),
            ]
        )
    table(header, rows)


if __name__ == "__main__":
    main()
