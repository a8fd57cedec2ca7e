"""What the benchmarks share: conditions, a table, and the last line of JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with --quick and --full (the default)."""
    parser = argparse.ArgumentParser(description=description)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="fewer repeats and studies")
    size.add_argument("--full", action="store_true", help="everything (the default)")
    return parser


def need_images(folder: str) -> None:
    """End with an error where there are no real images."""
    if "WARDROUND_DATA" not in os.environ:
        raise SystemExit(f"set WARDROUND_DATA to the folder that holds {folder}/ (docs/data.md says how to get it)")


def conditions(**extra: Any) -> dict[str, Any]:
    """The machine and the versions a number belongs to."""
    from wardround.runs.folder import fingerprint

    model = next(
        (line.split(":", 1)[1].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")), ""
    )
    return {
        **fingerprint(),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.system(),
        "load_before": round(os.getloadavg()[0], 2),
        **extra,
    }


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows in aligned columns."""
    cells = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        print(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )


def released(path: Path) -> tuple[Any, Any]:
    """The network of a released model, and its study."""
    from wardround.models.build import build_model
    from wardround.runs.releases import ReleasedModel

    model = ReleasedModel.opened(path)
    return model.network(lambda: build_model(model.study.model, model.study.modality), None, None), model.study


def kept_arguments(description: str) -> argparse.ArgumentParser:
    """`arguments`, and --out for runs that a second call goes on with."""
    parser = arguments(description)
    parser.add_argument("--out", type=Path, help="keep the runs here, and go on with those that are there")
    return parser


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Let a benchmark take --processes, for `engine_of`."""
    parser.add_argument("--processes", type=int, default=2, help="sites that train at once; the numbers are the same")


def engine_of(processes: int) -> dict[str, Any]:
    """What `wardround.run` takes so that sites train in so many processes at once; the numbers are the same."""
    return {"engine": "workers", "processes": processes} if processes > 1 else {"engine": "local"}


def finish(values: Mapping[str, Any]) -> None:
    """Print the last line."""
    print(json.dumps(values), flush=True)


def median(values: Sequence[float]) -> float:
    """The middle value."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else 0.5 * (ordered[half - 1] + ordered[half])


def cpu_seconds() -> float:
    """CPU time of this process and of its children that ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
