"""What an audit found, and how it is written: audit.json and audit.html."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from wardround.audit.epsilon import Bound
from wardround.audit.membership import Membership
from wardround.audit.properties import Property
from wardround.audit.scores import CONTROL_SSIM, Light, Row, worst_light
from wardround.protection.lint import Finding
from wardround.wire.files import write_text

Part = Literal["inversion", "membership", "properties", "epsilon"]
PARTS: tuple[Part, ...] = ("inversion", "membership", "properties", "epsilon")
FILES = ("audit.json", "audit.html")
KNOWLEDGE = (
    "the model's weights before the round, the loss, the learning rate, the number of local steps and of images",
    "of every image its acquisition: sampling mask and coil maps, or the scanner's geometry; coil maps that the study "
    "estimates come from the scan itself, so this is generous",
    "not the noise of a scan, nor any image of the site",
)
NOT_ATTACKED = (
    "a coordinator that sends models built to leak, beyond what the lint looks for",
    "updates of several rounds together, and sums that differ by one site",
    "adversaries with a trained generator of images, or with other images of the same patients",
)


@dataclass(frozen=True)
class Control:
    """Whether an attack recovers an image that is known to leak: batch 1, no protection, a network chosen for it."""

    attack: str
    trials: int
    ssim_median: float
    ssim_worst: float
    labels_right: int | None

    @property
    def works(self) -> bool:
        """Every second try must succeed."""
        return self.ssim_median >= CONTROL_SSIM


@dataclass(frozen=True, eq=False)
class Pictured:
    """A recovered image beside the true one, for eyes at the site alone."""

    variant: str
    attack: str
    truth: Tensor
    recovered: Tensor


@dataclass(frozen=True, eq=False)
class Audit:
    """Everything an audit found."""

    study: str
    study_sha256: str
    plan_sha256: str
    site: str
    model: str
    model_sha256: str
    architecture_sha256: str
    quick: bool
    inverted: bool
    lint: tuple[Finding, ...]
    controls: tuple[Control, ...]
    rows: tuple[Row, ...]
    membership: tuple[Membership, ...]
    properties: tuple[Property, ...]
    epsilon: Bound | None
    skipped: tuple[str, ...]
    pool: int
    seconds: float
    pictures: tuple[Pictured, ...]

    @property
    def light(self) -> Light:
        """Red where an image came back or the model is suspicious; never green where no attack works."""
        if self.lint or (self.epsilon is not None and not self.epsilon.holds):
            return "red"
        if not self.inverted:
            return "not attacked"
        found = worst_light([r.light for r in self.rows])
        if found in ("amber", "red"):
            return found
        return found if any(c.works for c in self.controls) else "attack not working"

    @property
    def verdict(self) -> str:
        """The light in one sentence."""
        if self.lint:
            return "Do not train on this model: it looks like one that was made to leak."
        if self.epsilon is not None and not self.epsilon.holds:
            return "The claimed privacy does not hold: an attack measured more than the claimed upper bound."
        return _VERDICTS[self.light]

    def to_json(self) -> dict[str, Any]:
        """The content of audit.json; numbers alone, and no picture."""
        return {
            "version": 1,
            "study": self.study,
            "study_sha256": self.study_sha256,
            "plan_sha256": self.plan_sha256,
            "site": self.site,
            "model": self.model,
            "model_sha256": self.model_sha256,
            "architecture_sha256": self.architecture_sha256,
            "quick": self.quick,
            "light": self.light,
            "verdict": self.verdict,
            "adversary": list(KNOWLEDGE),
            "not_attacked": [*self.skipped, *NOT_ATTACKED],
            "lint": [asdict(finding) for finding in self.lint],
            "control": [{**asdict(control), "works": control.works} for control in self.controls],
            "inversion": [row.to_json() for row in self.rows],
            "membership": [each.to_json() for each in self.membership],
            "properties": [each.to_json() for each in self.properties],
            "epsilon": None if self.epsilon is None else self.epsilon.to_json(),
            "pool": self.pool,
            "seconds": round(self.seconds, 1),
        }


_VERDICTS: dict[Light, str] = {
    "red": "An attack recovered or recognised an image of a patient from an update.",
    "amber": "An attack learned more of an image than the mean image tells, though no recognisable image came back.",
    "green": "No attack that works on the control recovered an image, or recognised more of them than chance.",
    "attack not working": "The attack is not working: it fails where it must succeed, so this audit shows nothing.",
    "not attacked": "No update was attacked.",
}


def write_audit(audit: Audit, out: Path, *, pictures: bool = False) -> Path:
    """Write audit.json and audit.html into a folder and return the page's path.

    `pictures` puts recovered images of patients beside the true ones into the page, which must then stay at the site.
    """
    write_text(out / FILES[0], json.dumps(audit.to_json(), indent=2, sort_keys=True, allow_nan=False) + "\n")
    write_text(out / FILES[1], render(audit, pictures=pictures))
    return out / FILES[1]


def render(audit: Audit, *, pictures: bool = False) -> str:
    """The page of an audit: one self-contained file, without JavaScript."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = environment.from_string(_resource("wardround.audit", "page.html"))
    return template.render(
        css=Markup(_resource("wardround.results", "style.css")),  # ours, not a result's
        audit=audit,
        style={"green": "better", "red": "worse"}.get(audit.light, ""),
        knowledge=KNOWLEDGE,
        not_attacked=(*audit.skipped, *NOT_ATTACKED),
        curves=_curves(audit.membership),
        pictures=[
            (p.variant, p.attack, _png(p.truth), _png(p.recovered)) for p in (audit.pictures if pictures else ())
        ],
        control_ssim=CONTROL_SSIM,
    )


def _resource(package: str, name: str) -> str:
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def _png(image: Tensor) -> str:
    """A grey image as a data URI."""
    grey = (image.clamp(0.0, 1.0).numpy() * 255.0).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


_DECADES = 3.0  # both axes of the membership figure begin at 0.001


def _curves(found: Iterable[Membership]) -> list[tuple[str, str]]:
    """Each ROC as points of a polyline in a unit square of 100, both axes logarithmic from 0.001 to 1."""

    def place(rate: float) -> float:
        return 100.0 * max(0.0, 1.0 + math.log10(max(rate, 1e-9)) / _DECADES)

    return [(each.attack, " ".join(f"{place(x):.2f},{100 - place(y):.2f}" for x, y in each.curve)) for each in found]
