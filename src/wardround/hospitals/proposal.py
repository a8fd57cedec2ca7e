"""What a coordinator proposes to a hospital and how the hospital stands to it: two messages, and a signed decision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import Field

from wardround.errors import Rejected, StudyError
from wardround.federation.facts import Hash, parsed
from wardround.protection.identity import Identity, frame
from wardround.study.base import Config
from wardround.study.hashes import study_sha256, written
from wardround.study.load import load_study, validate
from wardround.study.registry import BASELINES, BUILTIN, Reading
from wardround.study.schema import Study
from wardround.version import __version__
from wardround.wire.canonical import canonical_json
from wardround.wire.message import Header, Message

# Kinds of message: the question, and the answer to it.
PROPOSE, PROPOSED = "propose", "proposed"
# A study's text is a few kB; the largest that anyone wrote has less than a tenth of this.
LARGEST_STUDY = 1 << 20
_PURPOSE = "wardround/decision"
# A study as a hospital's resident process reads it: nothing is imported for what the study names.
CLOSED = Reading(foreign=True, unread=frozenset({"task", "model", "method"}))

Version = Annotated[str, Field(pattern=r"^[0-9A-Za-z.+!-]{1,40}$")]
PluginName = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.:-]{0,199}$")]


class Proposal(Config):
    """A study that a coordinator asks a hospital to take part in; what stands in the message that proposes it."""

    version: Literal[1] = 1
    study: dict[str, Any] = Field(description="what the study's file says (`wardround.study.hashes.written`)")
    compare: tuple[Literal["local"], ...] = Field((), description="what is trained beside the federation to compare")
    plan_sha256: Hash = Field(description="of the study with all defaults of the coordinator's version")
    package: Version = Field(description="the coordinator's version of Wardround")
    start_sha256: Hash | None = Field(None, description="of what the model begins with; `null` for fresh values")
    teacher_sha256: Hash | None = Field(None, description="of the released model that teaches, where there is one")
    roster: dict[str, Any] = Field(description="the list of sites and their keys that the federation's root signed")


class Decision(Config):
    """What a hospital decided on a study, signed with its identity, and all that the decision is bound to."""

    version: Literal[1] = 1
    state: Literal["approved", "refused"]
    site: str
    study_sha256: Hash
    compare: tuple[str, ...] = Field((), description="what is trained beside the federation to compare")
    plan_sha256: Hash
    package: Version = Field(description="the version of Wardround at the hospital when it decided")
    start_sha256: Hash | None
    teacher_sha256: Hash | None
    plugins: dict[PluginName, str] = Field(description="code that the study names, and the version installed here")
    roster_sha256: Hash = Field(description="of the keys of the study's sites, by the roster that the root signed")
    at: Annotated[str, Field(pattern=r"^[0-9T:.+-]{1,40}$", description="when, in UTC")]
    reason: str = Field("", max_length=500, description="why a study was refused, as the hospital wants it known")
    signature: str = Field("", pattern=r"^([0-9a-f]{128})?$", description="Ed25519, over all the rest")

    def signed(self, identity: Identity) -> Decision:
        """The same with the signature of a hospital's identity."""
        return self.model_copy(update={"signature": identity.sign(_PURPOSE, self._bare()).hex()})

    def verify(self, key: bytes) -> None:
        """Raise `Rejected` where `key` (32 bytes, public) did not sign it: it was changed, or made elsewhere."""
        try:
            Ed25519PublicKey.from_public_bytes(key).verify(bytes.fromhex(self.signature), frame(_PURPOSE, self._bare()))
        except (InvalidSignature, ValueError):
            raise Rejected(
                "the decision on this study was not signed with the key of this hospital, or was changed since; "
                "review the study and decide again"
            ) from None

    def _bare(self) -> bytes:
        return canonical_json(self.model_dump(mode="json", exclude={"signature"}))


class Standing(Config):
    """How a hospital stands to a study that was proposed to it."""

    version: Literal[1] = 1
    state: Literal["pending", "approved", "refused"]
    reason: str = Field("", max_length=1000, description="why it is refused, or why a decision no longer counts")
    decision: Decision | None = None


def proposal_of(study: Study, compare: Sequence[str], plan_sha256: str, roster: Mapping[str, Any]) -> Proposal:
    """The proposal of a study by its coordinator, whose version resolves it to `plan_sha256`.

    `roster` is the JSON of the list of sites that the root signed. Raises `StudyError` for a study that cannot be run
    across hospitals.
    """
    return validate(
        Proposal,
        {
            "study": written(study),
            "compare": list(compare),
            "plan_sha256": plan_sha256,
            "package": __version__,
            "start_sha256": start_of(study),
            "teacher_sha256": teacher_of(study),
            "roster": dict(roster),
        },
        "proposal",
    )


def proposal_message(proposal: Proposal, site: str) -> Message:
    """The message that proposes a study to a site. Raises `StudyError` for a study that is none."""
    sha256 = study_sha256(proposed_study(proposal))
    return Message(Header(PROPOSE, sha256, site, meta=proposal.model_dump(mode="json")))


def proposal_in(message: Message) -> tuple[Proposal, Study]:
    """What a message proposes.

    Raises `WireError` for what is of another schema, `Rejected` for a text that is too long or has another hash than
    the message names, and `StudyError` for one that is no study across hospitals.
    """
    if message.header.body_nbytes:
        raise Rejected("a proposal has no body; a study travels as text, and its code and weights never do")
    proposal = parsed(Proposal, message.header.meta)
    study = proposed_study(proposal)
    if study_sha256(study) != message.header.study:
        raise Rejected("the study's text is not the one that the message names by its hash")
    return proposal, study


def proposed_study(proposal: Proposal) -> Study:
    """The study of a proposal; nothing is imported for its task, model and method. Raises as `proposal_in` does."""
    if len(canonical_json(proposal.study)) > LARGEST_STUDY:
        raise Rejected(f"the text of a study has at most {LARGEST_STUDY} bytes, and this one has more")
    study = load_study(proposal.study, reading=CLOSED)
    if written(study) != proposal.study:
        # A reading that imports the kinds could then come to another hash: one text, one hash, at every party.
        raise Rejected("the study's text is not as `written` gives it; propose the study with its own version")
    if scanning := next((name for name, site in study.sites.items() if site.scans), None):
        raise StudyError(f"sites.{scanning}.scans: needs patients of other sites in one place, and these stay apart")
    if (start_of(study), teacher_of(study)) != (proposal.start_sha256, proposal.teacher_sha256):
        raise Rejected("the proposal names other base weights or another teacher than its study does")
    return study


def start_of(study: Study) -> str | None:
    """The hash of what the model begins with; nothing for fresh values. Raises `StudyError` where it is missing."""
    start = study.start
    if start.kind == "fresh":
        return None
    if not start.sha256:
        raise StudyError("start.sha256: is missing; across hospitals base weights are agreed on by their hash: add it")
    if start.adapter is not None and not start.adapter.sha256:
        raise StudyError(
            "start.adapter.sha256: is missing; across hospitals an adapter is agreed on by its hash: add it"
        )
    return start.sha256


def teacher_of(study: Study) -> str | None:
    """The hash of the released model that teaches; nothing without one. Raises `StudyError` where it is missing."""
    section: Any = study.task.model_dump(mode="json").get("teacher")
    if not isinstance(section, Mapping) or "file" not in section:
        return None
    found = section.get("sha256")
    if not isinstance(found, str) or len(found) != 64 or set(found) - set("0123456789abcdef"):
        raise StudyError("task.teacher.sha256: is missing; across hospitals a teacher is agreed on by its hash: add it")
    return found


def named_code(study: Study) -> Iterator[tuple[str, str]]:
    """What of a study is no part of the package: parts of the registry, and the names that the study gives.

    Nothing is imported; the study may have been read closed. Raises `StudyError` for a name that is no text.
    """
    for key, part, section in study.sections():
        given = section.model_dump(mode="json")
        if section.kind not in BUILTIN[part]:
            yield part, section.kind
        elif section.kind == "custom":
            yield part, _name(given.get("factory"), f"{key}.factory")
    evaluation = study.task.model_dump(mode="json").get("evaluation")
    named = evaluation.get("baselines") if isinstance(evaluation, Mapping) else None
    for name in named if isinstance(named, list | tuple) else ():
        if name not in BASELINES:
            yield "baseline", _name(name, "task.evaluation.baselines")


def _name(value: Any, key: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 200:
        raise StudyError(f"{key}: is no name of a plug-in; write the name of an installed entry point")
    return value
