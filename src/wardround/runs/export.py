"""Writes a released model's network as ONNX, for programs without torch, and checks it against torch."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Collection
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from wardround.errors import DataError, MissingExtra, StudyError
from wardround.plan.weights import model_sha256
from wardround.runs.reconstruct import PathLike
from wardround.runs.releases import ReleasedModel
from wardround.study.normalise import ZScore
from wardround.tasks.build import build_task
from wardround.tasks.task import Predicts
from wardround.wire.files import written

# Of the largest output: sums of up to some 10^4 products in float32 (relative rounding 6e-8 each), in another order.
_TOLERANCE = 1e-3
_CHECKED = 3  # examples: another number than the exporter saw
INPUT, OUTPUT = "image", "logits"


@dataclass(frozen=True)
class Exported:
    """What was written: the shape of an example, and the largest difference to torch, as a share of the largest output.

    `shape` is (channels, *grid); the number of examples of a batch is free; `formula` says how a channel is normalised.
    """

    output: Path
    shape: tuple[int, ...]
    difference: float
    formula: str = ZScore().formula()

    @property
    def said(self) -> str:
        """For people."""
        shape = " x ".join(map(str, self.shape))
        return (
            f"Wrote {self.output}: `{INPUT}` (batch x {shape}, {self.formula}) to "
            f"`{OUTPUT}`; largest difference to torch {self.difference:.1e} of the largest output. Research use only."
        )


def export(
    model: PathLike,
    output: PathLike,
    *,
    site: str | None = None,
    plugins: Collection[str] = (),
    weights: PathLike | None = None,
) -> Exported:
    """Write the network of a released model of images to `output` as ONNX, whole or not at all.

    It is the network alone: reading, normalising, windows, and what becomes of logits, are `wardround.predict`'s. The
    study is in the file's metadata. Raises `StudyError` for a model that reconstructs, whose network holds operators of
    a scanner, `MissingExtra` without the libraries, and `DataError` where the network cannot be exported or the file
    gives other numbers than torch.
    """
    released = ReleasedModel.opened(Path(model), plugins)
    kind = released.study.task.kind
    task = None if kind == "reconstruction" else build_task(released.study, plugins=released.plugins)
    if not isinstance(task, Predicts):
        raise StudyError(f"models of images can be exported, and this one's task is `{kind}`: it needs more than ONNX")
    network = released.network(task.build_model, site, None if weights is None else Path(weights))
    shape = task.input_shape()
    about = {
        "study": released.study.model_dump_json(),
        "model_sha256": model_sha256(released.tensors, released.metadata) if "shared" in released.metadata else "",
        "use": "research use only",
    }
    data = _exported(network, shape, about)
    difference = _difference(network, shape, data)
    if not difference <= _TOLERANCE:
        raise DataError(
            f"the exported network gives other numbers than torch (by {difference:.1e} of the largest output); nothing "
            "was written"
        )
    with written(Path(output)) as file:
        file.write(data)
    normalise = getattr(released.study.task, "normalise", ZScore())
    return Exported(Path(output), shape, difference, normalise.formula())


def _exported(network: nn.Module, shape: tuple[int, ...], about: dict[str, str]) -> bytes:
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtra("ONNX", "onnx") from error
    batch = torch.zeros(2, *shape)
    loud = logging.getLogger("torch.onnx")
    level = loud.level
    try:
        # The exporter tells its progress on stdout, and warns of what it does itself.
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            loud.setLevel(logging.ERROR)
            program: Any = torch.onnx.export(
                network,
                (batch,),
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
            made = program.model_proto
    except Exception as error:
        # The exporter has errors of many kinds; none says more than that.
        raise DataError(
            "this network cannot be exported: the exporter does not know one of its operations",
            detail=" ".join(str(error).split())[:500],
        ) from error
    finally:
        loud.setLevel(level)
    onnx.helper.set_model_props(made, about)
    data: bytes = made.SerializeToString()
    return data


def _difference(network: nn.Module, shape: tuple[int, ...], data: bytes) -> float:
    """The largest difference of outputs on random images, as a share of the largest output."""
    import onnxruntime

    batch = torch.randn(_CHECKED, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = network(batch).float().numpy()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (theirs,) = session.run([OUTPUT], {INPUT: batch.numpy()})
    if theirs.shape != ours.shape or not np.isfinite(theirs).all():
        return float("inf")
    return float(np.abs(theirs - ours).max() / max(float(np.abs(ours).max()), 1e-12))
