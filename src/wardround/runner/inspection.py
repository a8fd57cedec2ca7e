"""What a released model is, for people who have nothing but its file."""

from __future__ import annotations

from pathlib import Path

from wardround.runner.arms import FEDERATED
from wardround.runner.protocols import lines, read_protocols
from wardround.runner.release import load_model, study_of


def inspect_model(path: Path) -> str:
    """What a released model is and which scanners it was trained on, for people. Raises `DataError`."""
    tensors, metadata = load_model(path)
    study = study_of(path, metadata)
    kind = getattr(study.model, "kind", "")
    heading = (
        "a released model",
        f"study {study.name} ({metadata.get('study_sha256', 'unknown')}), arm {metadata.get('arm', FEDERATED)}, round "
        f"{metadata.get('round', 'unknown')}",
        f"{study.modality.upper()}, {kind}: {sum(tensor.size for tensor in tensors.values()):,} values; "
        f"{study.method.kind}",
    )
    return "\n  ".join((*heading, *lines(read_protocols(metadata, study))))
