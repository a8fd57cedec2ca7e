"""What sites that do not train are asked for: to validate a round's model as a hospital that did not train gets it.

Their answers are merged with the validation sums of the sites that train, so that a round has one validation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from wardround.federation.exchange import Call
from wardround.federation.measuring import RELEASED
from wardround.learning.methods.method import Method
from wardround.storage.journal import State
from wardround.wire.files import written
from wardround.wire.message import FileBody
from wardround.wire.tensors import TensorFile, TensorWriter

FILE = "validated.tensors"
_AWAY = "validated without "


def as_unseen(call: Call, file: TensorFile, sha256: str) -> Call:
    """A validation that asks for the model of a round as the hospital would get it, were it released: `file`."""
    return replace(
        call,
        meta={**call.meta, "split": "validation", "evaluator": RELEASED, "unseen_site": True},
        tensors=file.table,
        body=FileBody(file.path, file.nbytes),
        body_sha256=sha256,
        absent=(),
    )


def served_body(method: Method, state: State, folder: Path) -> tuple[TensorFile, str]:
    """The model of a round as a hospital that did not train gets it, as a message's body, and its hash.

    One file in `folder`, written anew for every round: it is read while sites are asked, and not after.
    """
    with written(folder / FILE) as file:
        writer = TensorWriter(file)
        for name, tensor in method.release_for(None, state.public, state.private).items():
            writer.add(name, tensor)
    return TensorFile(folder / FILE, writer.table), writer.sha256


def went_without(notes: tuple[str, ...], missing: Mapping[str, str]) -> tuple[str, ...]:
    """A round's notes, with the evaluators that its validation went without; none of an earlier validation of it."""
    kept = (note for note in notes if not note.startswith(_AWAY))
    return *kept, *(f"{_AWAY}{site} ({reason})" for site, reason in sorted(missing.items()))
