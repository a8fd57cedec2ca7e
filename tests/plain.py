"""A released model of random adapters, as a run would have left it, in no time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from wardround.models.adapters import added_values
from wardround.plan.arm_specs import ArmSpecs
from wardround.plan.weights import FORMAT, FROZEN, FROZEN_SHA256, save_frozen


def plain(specs: ArmSpecs, path: Path) -> Path:
    """Written to `path`, with its frozen part in `weights` beside it."""
    context = specs.model_context
    random = torch.Generator().manual_seed(4)
    state = {name: tensor.clone() for name, tensor in context.model.state_dict().items()}
    for name in added_values(context.model):
        state[name] = 0.3 * torch.randn(state[name].shape, generator=random)
    tensors = {name: np.ascontiguousarray(t.numpy()) for name, t in state.items() if name not in context.frozen}
    frozen = specs.frozen_sha256
    named = {} if frozen is None else {FROZEN: " ".join(sorted(context.frozen)), FROZEN_SHA256: frozen}
    if frozen is not None:
        save_frozen(specs.frozen_values(), frozen, path.parent)
    about = {"format": FORMAT, "study": specs.study.model_dump_json(), "shared": " ".join(sorted(tensors))}
    save_file(tensors, path, metadata={**about, **named})
    return path
