"""What tests of methods from MRI share: a toy network with prompts, and a study that starts from one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.federation.alignment import FINE
from tests.toys import Regression, toy_study
from wardround.plan.weights import file_sha256

TOKENS, WIDTH = 3, 10


class Block(nn.Module):
    """A token looks at itself and at learned ones, before the next block does: (B, width) -> (B, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts = nn.Parameter(0.3 * torch.randn(1, TOKENS, WIDTH))
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        seen = torch.cat([self.prompts.expand(len(h), -1, -1), h[:, None]], dim=1)
        weights = torch.softmax(seen @ h[:, :, None], dim=1)
        found: Tensor = torch.tanh(self.layer((weights * seen).sum(1)))
        return found


@dataclass(frozen=True)
class Prompted(Regression):
    """The toy regression with two blocks of tokens, of which one has a batch norm, behind it."""

    def build_model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(self.features, WIDTH), Block(), nn.BatchNorm1d(WIDTH), Block(), nn.Linear(WIDTH, 1)
        )


def make_prompted(**options: Any) -> Prompted:
    return Prompted(**options)


def prompted_study(folder: Path, **changes: Any) -> Any:
    """A study of FedPR that begins with the values of `folder / trained.safetensors`, which it makes."""
    torch.manual_seed(4)
    path = folder / "trained.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(Prompted().build_model().state_dict(), path)
    values = {
        "method": {"kind": "fedpr"},
        "task": {"kind": "custom", "factory": "tests.learning.mri_methods:make_prompted", "options": {}},
        "start": {"kind": "weights", "file": path.name, "sha256": file_sha256(path)},
        "local": {"steps": 3, "batch": 4, "optimizer": "adam", "lr": 0.05},
        "schedule": {"rounds": 2, "keep": 3},
        "protection": FINE,
    }
    return toy_study(**{**values, **changes})
