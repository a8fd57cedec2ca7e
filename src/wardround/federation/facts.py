"""What a coordinator learns of a site beside updates, each with a schema: facts before a run, spending after it.

A coordinator knows of a site what came in a message, and nothing else: a value that did not come is an error or is
shown as missing, and never has a default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from wardround.errors import WireError
from wardround.study.base import Config
from wardround.study.protocols import HeaderFacts

# Kinds of message, and of the answers to the first two.
FACTS, SPENT, ROSTER, DELIVER = "facts", "spent", "roster", "deliver"
# In a question for one of them: the resolved study of the coordinator.
PLAN = "plan"
# In the answer to a release: the hash of the private part that the site completed the model with.
LOCAL_SHA256 = "local_sha256"

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=1 << 31)]


class Patients(Config):
    """Numbers of a site's patients by split; `None` for a handful that its rules keep."""

    train: Count | None
    validation: Count | None
    test: Count | None


class SiteFacts(Config):
    """What a site says of itself before a run, as far as its rules let out.

    `patients` and `fingerprint` are `None` where its data cannot be used. The fingerprint is keyed with a secret of the
    site: it shows that data changed and nothing else.
    """

    version: Literal[1] = 1
    public_key: Hash = Field(description="of the key that signs what the site says, in all arms")
    fingerprint: Hash | None = Field(description="changes when the data do")
    patients: Patients | None
    set_aside: Count | None = Field(
        None, description="patients whose files cannot be used; `null` for a handful that its rules keep"
    )
    headers: HeaderFacts = HeaderFacts()
    machine: dict[str, str] = Field(
        description="versions and processor of the site's process, device, precision and threads"
    )


class SiteSpending(Config):
    """What a site's patients' privacy has cost, by its own ledger."""

    version: Literal[1] = 1
    epsilon: float = Field(ge=0.0, le=1e9, description="of the study")
    epsilon_ledger: float = Field(ge=0.0, description="of all studies in the site's ledger")
    delta: float = Field(gt=0.0, lt=1.0)
    steps: Count
    noise_multiplier: float = Field(ge=0.0)
    sample_rate: float = Field(gt=0.0, le=1.0)
    shared: bool = Field(description="whether the noise of some rounds counts only in sums over sites")


_Schema = TypeVar("_Schema", bound=Config)


def parsed(schema: type[_Schema], meta: Mapping[str, Any]) -> _Schema:
    """What a message holds; raises `WireError` where it is not of the schema."""
    try:
        return schema.model_validate(dict(meta))
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise WireError(f"an answer that is no {schema.__name__} of this version ({where})") from None


def meta_of(said: Config) -> dict[str, Any]:
    """What a message holds of it."""
    return said.model_dump(mode="json")
