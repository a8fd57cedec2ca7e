"""The federation's file: where the coordinator is reached, and how long it waits. A study says nothing of either."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field

from wardround.study.base import Config
from wardround.study.load import validate
from wardround.study.yaml_text import read_yaml
from wardround.wire.files import write_text

Carrier = Literal["nvflare", "https"]
Port = Annotated[int, Field(ge=1, le=65535)]


class Deadlines(Config):
    """How long a coordinator waits for sites."""

    reply: float = Field(
        3600.0, gt=0.0, description="seconds until a site that was asked and did not answer is left out of a round"
    )
    attempts: int = Field(
        20, ge=0, description="how often a round that too few sites answered is tried again before the study stops"
    )
    pause: float = Field(30.0, ge=0.0, description="seconds between two such attempts")
    delivery: float = Field(
        30 * 86400.0, ge=0.0, description="seconds for which a released model waits for a site that is away"
    )


class Federation(Config):
    """What every party of a federation knows of it: `federation.yaml`, the same at the coordinator and in each kit."""

    version: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$", description="lower-case letters, digits and hyphens")
    carrier: Carrier = Field("nvflare", description="what carries messages: NVFlare, or plain HTTPS")
    host: str = Field(
        pattern=r"^[A-Za-z0-9.-]{1,253}$", description="name or address at which sites reach the coordinator"
    )
    port: Port = Field(8443, description="the coordinator's one open port; sites need none")
    root_key: str = Field(
        pattern=r"^[0-9a-f]{64}$", description="public key (Ed25519) of the root that signs the list of sites"
    )
    deadlines: Deadlines = Deadlines()
    largest_gb: float = Field(4.0, gt=0.0, description="GB that a message may have; a longer one is refused unread")

    @property
    def largest_nbytes(self) -> int:
        """The most bytes of a message's body."""
        return int(self.largest_gb * 1e9)


def load_federation(path: Path) -> Federation:
    """Read a federation's file. Raises `StudyError`, which names the key, for one that is not of this schema."""
    return validate(Federation, read_yaml(path, "federation"), "federation")


def save_federation(federation: Federation, path: Path) -> None:
    """Write a federation's file."""
    write_text(path, yaml.safe_dump(federation.model_dump(mode="json"), sort_keys=False))
