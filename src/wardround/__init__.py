"""Wardround: train imaging models across hospitals without moving a scan.

result = wardround.run("study.yaml", "sites.yaml", "out", compare=["local", "pooled"])
result.metric("federated", "mean", "psnr")
wardround.predict("out/models/federated.safetensors", ["kspace.npy"], "images", fallback="tv")
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from wardround.version import __version__

# On a busy machine OpenMP's default spins and is ten times slower; it must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__all__ = [
    "Result",
    "Study",
    "WardroundError",
    "__version__",
    "evaluate",
    "join",
    "load_sites",
    "load_study",
    "predict",
    "reconstruct",
    "run",
    "update",
]

_HOMES = {
    "Result": "wardround.results.schema",
    "run": "wardround.runs.session",
    "evaluate": "wardround.runs.session",
    "join": "wardround.living.joining",
    "update": "wardround.living.update",
    "predict": "wardround.runs.predict",
    "reconstruct": "wardround.runs.reconstruct",
    "Study": "wardround.study",
    "load_study": "wardround.study.load",
    "load_sites": "wardround.study.sites",
    "WardroundError": "wardround.errors",
}

if TYPE_CHECKING:
    from wardround.errors import WardroundError
    from wardround.living.joining import join
    from wardround.living.update import update
    from wardround.results.schema import Result
    from wardround.runs.predict import predict
    from wardround.runs.reconstruct import reconstruct
    from wardround.runs.session import evaluate, run
    from wardround.study import Study
    from wardround.study.load import load_study
    from wardround.study.sites import load_sites


def __getattr__(name: str) -> Any:
    # Late, so that a coordinator or a command that needs no torch does not wait for it.
    if name not in _HOMES:
        raise AttributeError(f"module 'wardround' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
