"""What a process is made of: versions and the kind of processor, and where the sites of a run computed."""

from __future__ import annotations

import platform
from collections.abc import Mapping

from wardround.version import __version__

#: What a site says of where it computes, beside the versions of its process.
PLACED = ("device", "precision", "threads")


def fingerprint() -> dict[str, str]:
    """What must be the same for the same bits: versions and the kind of processor."""
    import numpy
    import torch

    return {
        "wardround": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def placed(machines: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Device, precision and threads of a run, by what each site says of its machine: one, or each with its sites."""
    found: dict[str, str] = {}
    for key in PLACED:
        sites: dict[str, list[str]] = {}
        for site, machine in machines.items():
            if key in machine:
                sites.setdefault(machine[key], []).append(site)
        if sites:
            whose = (f"{value}: {', '.join(names)}" for value, names in sites.items())
            found[key] = next(iter(sites)) if len(sites) == 1 else "; ".join(whose)
    return found
