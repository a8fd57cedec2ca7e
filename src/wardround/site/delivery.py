"""What a site does with a released model: it keeps the model, and records which of its patients were in it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from wardround.errors import Rejected, WireError
from wardround.federation.release import (
    CARD,
    model_of_study,
    model_path,
    open_model,
    own_folder,
    save_frozen_part,
    shared_sha256,
)
from wardround.imaging.datasets.split import SPLIT_NAMES, SplitName
from wardround.plan.arm_specs import ArmSpecs
from wardround.plan.arms import FEDERATED
from wardround.site.lineage import Digests, Lineage
from wardround.site.own_parts import OwnParts, second_name
from wardround.storage.blobs import disk_error
from wardround.storage.store import SiteStore
from wardround.study.places import release_in
from wardround.study.start import FromRelease
from wardround.tasks.task import Dataset, Named
from wardround.wire.files import written
from wardround.wire.message import MAX_HEADER, FileBody, Message, body_sha256

_PATIENTS = "patients"
_TRAIN: SplitName = "train"


@dataclass(frozen=True)
class Deliveries:
    """Where a site keeps released models: the folder of a study's run, the agent's store, and the site's history.

    `lasts`: whether the history outlives the run, so that the model is kept there too.
    """

    site: str
    arm_specs: ArmSpecs
    folder: Path
    store: SiteStore
    history: Path
    lasts: bool = False

    def note_patients(self, dataset: Dataset) -> None:
        """Keep who trains, validates and tests in this run, as digests, until there is a release; the first stands.

        Nothing of a site that sees the patients of others, or whose data name none. Raises `DataError` where the
        history folder cannot be written.
        """
        if self.arm_specs.study.sites[self.site].scans or not isinstance(dataset, Named):
            return
        if self.store.written_value(_PATIENTS) is None:
            found = Lineage(self.history).digests({part: tuple(dataset.names(part)) for part in SPLIT_NAMES})
            self.store.write_once(_PATIENTS, 0, json.dumps(found))

    def take(self, request: Message) -> None:
        """Keep a released model and its card, and put on record who was in it.

        Raises `Rejected` for a body that is larger than the study's model or not what the header says, `DataError` for
        one that is no released model, and where the history cannot be written, and `StudyError` for one of another
        study.
        """
        header = request.header
        card = header.meta.get("card")
        if header.meta.keys() != {"card"} or not isinstance(card, str):
            raise WireError("a delivery needs a card, and nothing else")
        model, text = model_path(self.folder, FEDERATED), card.encode()
        # On one machine the coordinator's own files lie where every site's would: there is nothing to read or write.
        there = _holds(model, header.body_sha256)
        if not there:
            self._check(request)
        if self.store.write_once("delivered", 0, header.body_sha256) != header.body_sha256:
            raise Rejected(f"site {self.site} has the study's released model; another one is not kept in its place")
        try:
            if not there:
                save_frozen_part(self.arm_specs, self.folder)
                with written(model) as file:
                    for chunk in request.body.chunks():
                        file.write(chunk)
            if not _holds(self.folder / CARD, hashlib.sha256(text).hexdigest()):
                with written(self.folder / CARD) as file:
                    file.write(text)
            release = shared_sha256(model)
            self._record(release)
            if self.lasts:
                self._keep(release, model)
        except OSError as error:
            raise disk_error(error) from error

    def _record(self, release: str) -> None:
        """Put on record which patients were in a release, and keep the site's private part of it."""
        study = self.arm_specs.study
        if study.sites[self.site].scans:
            return
        parent = study.start.sha256 if isinstance(study.start, FromRelease) else None
        noted = self.store.written_value(_PATIENTS)
        parts: Digests = {} if noted is None else json.loads(noted)
        if not study.trains:
            # A model that was only measured here did not train here in this study.
            parts = {part: found for part, found in parts.items() if part != _TRAIN}
        # First the part, then the word that there is one.
        kept, part = OwnParts(self.history), self._own_part(parent)
        own = kept.keep(release, part)
        if own is not None and part != self._trained_part:
            # Beside the model, where it is looked for when the model is applied at this site.
            second_name(kept.path(release), self._trained_part)
        Lineage(self.history).record_digests(release, parent, self.arm_specs.study_sha256, parts, own)

    def _keep(self, release: str, model: Path) -> None:
        """Keep the release under its hash, with its frozen part: a study that continues it finds it there."""
        second_name(model, release_in(self.history, release))
        if (frozen := self.arm_specs.frozen_sha256) is not None:
            part = Path("weights") / f"{frozen}.safetensors"
            second_name(self.folder / part, release_in(self.history, release).parent / part)

    def _own_part(self, parent: str | None) -> Path:
        """The site's private part of the released model: of one that it did not train, what it had of the parent."""
        if self._trained_part.exists() or parent is None or self.arm_specs.study.continues is None:
            return self._trained_part
        return OwnParts(self.history).path(parent)

    @property
    def _trained_part(self) -> Path:
        """Where a site that trains writes its private part of the released model."""
        return own_folder(model_path(self.folder, FEDERATED), self.site) / "local.safetensors"

    def _check(self, request: Message) -> None:
        """Raise for a body that is not a released model of this study; see `take`."""
        header, model_context = request.header, self.arm_specs.model_context
        initial = {name: tensor for name, tensor in model_context.initial.items() if name not in model_context.frozen}
        values = sum(tensor.numel() * tensor.element_size() for tensor in initial.values())
        if not isinstance(request.body, FileBody) or header.body_nbytes > values + MAX_HEADER:
            raise Rejected("a delivery that is larger than the study's model")
        if body_sha256(request.body) != header.body_sha256 or request.body.nbytes != header.body_nbytes:
            raise Rejected("the released model that arrived is not the one that was sent")
        # Read as what a clinic will read: nothing else is kept under the name of the study's model.
        tensors = model_of_study(request.body.path, self.arm_specs.study_sha256, self.arm_specs.plan_sha256)
        if {name: tensor.shape for name, tensor in tensors.items()} != {n: tuple(t.shape) for n, t in initial.items()}:
            raise Rejected("a delivery of another network than the study's")
        # Its hash, by which it goes on record, is over those.
        said = open_model(request.body.path)[1].get("shared", "").split()
        if set(said) != set(self.arm_specs.arm_spec(FEDERATED).policy.names("shared")):
            raise Rejected("a delivery that does not say which of its values are shared, as the study has them")


def _holds(path: Path, sha256: str) -> bool:
    """Whether a file has these very bytes."""
    return path.is_file() and body_sha256(FileBody(path, path.stat().st_size)) == sha256
