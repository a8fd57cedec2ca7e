"""What a process is made of: versions and the kind of processor."""

from __future__ import annotations

import platform

from wardround.version import __version__


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
