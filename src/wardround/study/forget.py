"""What a study says that makes a model without a hospital which left: another model had it, and people can compare."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from wardround.study.base import Config


class Forget(Config):
    """A hospital left, and this study makes the model that takes the place of one that it trained.

    The two models together reveal what the hospital contributed: their difference is near its update, turned round. So
    every hospital of the study, and the one that left, says beforehand that it approves.
    """

    site: str = Field(description="the hospital that left")
    release: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] = Field(
        description="`model_sha256` of the released model that the hospital trained, and that this study replaces"
    )
    how: Literal["retrain", "unlearn", "recover"] = Field(
        "retrain",
        description="`retrain`: trained anew from a model that the hospital never trained, so that nothing of it is "
        "left; `unlearn`: first part of the approximate way, rounds in which the hospital takes back what it taught "
        "(`method: {kind: unlearn}`); `recover`: second part, rounds without it that go on from there",
    )
    approved_by: tuple[str, ...] = Field(
        min_length=1,
        description="the hospitals that approve of what this model and the released one together reveal: every site of "
        "the study, and the one that left, which need not be online. Across hospitals each one's signed approval of "
        "the study is asked beside it",
    )

    def describe(self) -> str:
        """What `check`, and a hospital's review, print of it."""
        ways = {
            "retrain": "trained anew without it",
            "unlearn": "it takes back what it taught; what is left of it is measured, and is not nothing",
            "recover": "goes on without it after it took back what it taught; what is left of it is not nothing",
        }
        return (
            f"hospital {self.site}, which left: {ways[self.how]}. This model and the released model {self.release} "
            f"together reveal what {self.site} contributed, for their difference is near its update; approved by "
            f"{', '.join(self.approved_by)}"
        )
