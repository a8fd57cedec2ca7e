"""A site: one object with one entry, `handle(message) -> message`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from wardround.deidentify import describe_error
from wardround.errors import DataError, Rejected, WardroundError, WireError, Withheld
from wardround.federation.exchange import DONE, EVALUATE, RELEASE, TRAIN, UPDATE
from wardround.federation.facts import LOCAL_SHA256
from wardround.federation.logs import SENT, SiteLog
from wardround.federation.parts import LACKS
from wardround.federation.refusals import refusal
from wardround.learning.methods.method import MODEL
from wardround.learning.training import LOCAL, Learner
from wardround.plan.sums import LOSS, SECONDS, validation_sums
from wardround.protection.gates import check_body
from wardround.protection.rounding import kept_root, rounding
from wardround.protection.secret import SecretRoot
from wardround.site.aborted import AbortedRounds
from wardround.site.admission import Admission, aborted_numbers
from wardround.site.egress import check_egress
from wardround.site.inspection import Inspector
from wardround.site.measured import MeasuredSets
from wardround.site.parts import KeptParts, Lacking
from wardround.site.patients import OwnResults, PatientRows
from wardround.site.protocol import ClearUpload, Evaluator, SiteProtocol, SiteReply
from wardround.site.rules import Rules
from wardround.storage.blobs import disk_error
from wardround.storage.hash_log import LOG, HashLog, begun_by
from wardround.storage.store import NOTHING, Memory, SiteStore
from wardround.wire.canonical import digest
from wardround.wire.files import written
from wardround.wire.message import SMALL, FileBody, Header, HeldBody, Message, held, write_chunks
from wardround.wire.random import public_generator
from wardround.wire.scales import ScaleRules, remembered, scales_in
from wardround.wire.tensors import TensorFile, tensors_sha256
from wardround.wire.update import Layout, encode, limits

Array = npt.NDArray[Any]
log = logging.getLogger(__name__)
_EACH = {"test": "an arm", "validation": "a round", "weight": "a round"}
# The scales of the last round that a site answered.
_SCALES = "scales"


class Site:
    """Answers messages; idempotent by message id. Exceptions become `error` replies with scrubbed reasons."""

    def __init__(
        self,
        name: str,
        rules: Rules,
        learner: Callable[[], Learner],
        store: SiteStore,
        *,
        protocol: SiteProtocol | None = None,
        evaluators: Mapping[str, Evaluator] | None = None,
        folder: Path | None = None,
        rows: PatientRows | None = None,
        sets: MeasuredSets | None = None,
        withdrawals: Callable[[], int] = lambda: 0,
        follows: Callable[[str, str], bool] = lambda before, now: False,
        carried: Callable[[], Mapping[str, Array]] | None = None,
    ) -> None:
        self.name = name
        self.rules = rules
        self.store = store
        self.folder = folder
        self.minutes = SiteLog(name, _record(name, rules.identity, store))
        self.aborted = AbortedRounds(store)
        self._admission = Admission(name, rules, store, self.aborted, self.minutes)
        self._parts = KeptParts(store.root / "parts", store.cipher)
        self._make_learner = learner
        self._learner: Learner | None = None
        # How many patients withdrew so far, and whether data of one fingerprint became those of another by that alone.
        self._withdrawals, self._follows = withdrawals, follows
        self._gone = 0
        self._protocol: SiteProtocol = protocol or ClearUpload()
        self._evaluators = evaluators or {}
        self._carried = carried
        own, note = rows or PatientRows(), self.minutes.note
        self._own = OwnResults(name, rules.arm, rules.baselines, rules.egress, own, sets, note)
        inspector = Inspector(
            name, store, rules.layout, rules.codec, rules.initial_scale, self.minutes.note, rules.catch_up
        )
        self._inspector = inspector if rules.lint else None
        self._scales = ScaleRules(rules.layout, rules.initial_scale, rules.initial, frozenset({MODEL}))

    def handle(self, request: Message) -> Message:
        """Answer a message: from the store if it was answered before, otherwise by doing what it asks."""
        try:
            self._protocol.admit(request, self)
            done = self.store.reply(request.id)
            if done is not None:
                return done
            self._admission.check(request)
            with self._parts.whole(request) as whole:
                answer = self._answer(whole)
                self._keep(whole)
            check_egress(answer.reply, self.rules.layouts, self._protocol.replies)
            # On record before it can leave; told again after a crash in between, it is the same record.
            reply = self.minutes.sent(request, answer.reply, sync=answer.memory is None)
            tail = self.minutes.record.tail()
            facts = {} if answer.memory is None else _seen_scales(request.header)
            self.store.finish(
                reply, answer.memory, set(answer.keep), aborted=aborted_numbers(request.header), tail=tail, facts=facts
            )
            return reply
        except Lacking as lacking:
            reply = request.reply(LACKS, meta={LACKS: lacking.places})
            check_egress(reply, {}, frozenset())
            self.minutes.note(LACKS, {"kind": request.header.kind, "round": request.header.round})
            return reply
        except Exception as error:
            # The cause stays here; what leaves is text that is safe by construction. Logs are read outside, too.
            reason = describe_error(error)
            log.warning("site %s could not answer %r: %s", self.name, request.header.kind, reason)
            log.debug("detail: %s", getattr(error, "detail", ""), exc_info=True)
            self.minutes.declined(request, error, reason)
            return refusal(request, error)

    def _keep(self, request: Message) -> None:
        """Keep of a round's broadcast what the next rounds have as it is, and nothing once there are none."""
        header = request.header
        if header.kind == TRAIN:
            self._parts.keep(request, self.rules.lasting.kept(header.round, header.tensors))
        elif header.kind == RELEASE or header.meta.get("split") == "test":
            self._parts.clear()

    def inside(self) -> Site:
        """The same site for itself: it answers in the clear, and whoever asks must be within."""
        _ = self.learner  # made once, for the copies too
        inner = copy(self)
        inner._protocol = ClearUpload()
        return inner

    @property
    def learner(self) -> Learner:
        """The learner, made when it is first needed: its data must be those the run began with.

        Less those of patients who withdrew since: they are gone from the next message on.
        """
        gone = self._withdrawals()
        if self._learner is None or self._gone != gone:
            self._learner, self._gone = None, gone
            learner = self._make_learner()
            found = learner.dataset.fingerprint()
            known = self.store.fact("fingerprint")
            if known is None:
                self.store.set_fact("fingerprint", found)
            elif known != found and not self._follows(known, found):
                raise DataError(
                    f"the data of site {self.name} changed since the run began; restore them, or start a new run in "
                    "another folder"
                )
            self._learner = learner
        return self._learner

    def public_state(self, request: Message) -> TensorFile:
        """The verified global state that a request carries; raises `WireError` when bytes are not what was signed."""
        if not isinstance(request.body, FileBody):
            raise WireError("a global state must arrive as a file")
        # A small one is read and hashed once in this process: what is used are the very bytes that were verified.
        body = held(request.body)
        check_body(replace(request, body=body))
        data = memoryview(body.data) if isinstance(body, HeldBody) else None
        state = TensorFile(request.body.path, request.header.tensors, data)
        if state.nbytes != request.header.body_nbytes:
            raise Rejected("the tensor table does not fit the body")
        return state

    def work(self, request: Message) -> tuple[Iterator[bytes | memoryview], Memory, frozenset[int]]:
        """Validate and train as asked; the update's bytes, the new private state, and the rounds to keep."""
        header = request.header
        public = self.public_state(request)
        # One more tensor, or another order, would make another start of the same model (`federation.history`).
        if not self.rules.lasting.fits(header.tensors, self.rules.initial):
            raise Rejected("the global state holds other tensors than the study's, or in another order")
        layout, scales = self.rules.layout, scales_in(header.meta)
        self._check_scales(header.round, scales, public)
        memory = self._memory(header.round - 1, aborted_numbers(header))
        learner = self.learner
        inspector = self._inspector
        seen = None if inspector is None else inspector.check(header.round, public, learner.known)
        if learner.measures_validation:
            self._weigh(header, learner)
        learner.load(public, memory)
        metrics: dict[str, Any] = {}
        if header.meta.get("validate"):
            # The model is the one of the round before, and has one validation, whichever kind of request asks.
            self._measure_once("validation", header.round - 1, header.body_sha256, header)
            metrics |= self._validation_sums(header.round, learner.held_out.evaluate("validation"))
        try:
            trained = learner.train(header.round, public, memory, self.minutes.heard(header))
        except Exception:
            if inspector is not None and seen is not None:
                inspector.remember(seen, {}, {}, {})
            raise
        metrics |= {LOSS: trained.loss, SECONDS: trained.seconds}
        if inspector is not None and seen is not None:
            inspector.remember(seen, scales, trained.weights, trained.changes.get(MODEL, {}))
        largest = limits(layout, scales, trained.weights)
        changes, residual = self.rules.codec.compress(header.round, trained.changes, memory.tensors, largest)
        kept = learner.kept(trained, self.rules.codec.lost(largest, residual))
        chunks = encode(
            layout,
            scales,
            trained.weights,
            changes,
            metrics,
            rounding(self._rounding_root, self.name, header.round, scales, header.body_sha256),
        )
        keep = frozenset(int(n) for n in header.meta.get("keep", ()))
        return chunks, Memory({**kept, **residual}, {}), keep

    def _memory(self, number: int, aborted: Collection[int] = ()) -> Memory:
        """The private state after a round; before the first, the site's part of the release that is continued."""
        found = self.store.memory(number, without=aborted)
        if found is not NOTHING or self._carried is None:
            return found
        return Memory({LOCAL + name: values for name, values in self._carried().items()}, {})

    @cached_property
    def _rounding_root(self) -> bytes:
        return self.rules.rounding_root or kept_root(self.store)

    def _check_scales(self, number: int, scales: Mapping[str, float], public: TensorFile) -> None:
        """Refuse scales that no honest rounds come to, with the lint on or off."""
        fact = self.store.fact(_SCALES)
        self._scales.check(number, scales, public, {} if fact is None else json.loads(fact))

    def reply_with(self, request: Message, kind: str, chunks: Iterator[bytes | memoryview], layout: Layout) -> Message:
        """A reply whose body is streamed to the store first."""
        with self.store.blobs.draft(durable=False) as draft:
            small = HeldBody.of(chunks) if layout.nbytes <= SMALL else None
            nbytes, draft.name = write_chunks(draft.file, chunks) if small is None else small.write(draft.file)
        reply = request.reply(kind, meta={"layout": layout.sha256})
        header = replace(reply.header, body_nbytes=nbytes, body_sha256=draft.name)
        body = FileBody(self.store.blobs.path(draft.name), nbytes)
        return Message(header, body if small is None else body.with_bytes(small))

    # ---------------------------------------------------------------------------------------------------------------

    def _answer(self, request: Message) -> SiteReply:
        if request.header.kind in self._protocol.kinds:
            return self._protocol.answer(request, self)
        if request.header.kind == EVALUATE:
            return self.evaluate(request)
        if request.header.kind == RELEASE:
            return self._release(request)
        raise WireError(f"site {self.name} does not know messages of kind {request.header.kind[:40]!r}")

    def evaluate(self, request: Message) -> SiteReply:
        """Evaluate the model that the request carries: what leaves is over all patients of a split, never of one."""
        chunks, layout = self.measure(request)
        return SiteReply(self.reply_with(request, UPDATE, chunks, layout))

    def measure(self, request: Message) -> tuple[Iterator[bytes | memoryview], Layout]:
        """The bytes of an evaluation, and their layout: validation sums to pool, or the site's own results."""
        header = request.header
        split = header.meta.get("split")
        if split not in ("validation", "test"):
            raise WireError("an evaluation needs split: validation or test")
        pooled = header.meta["layout"] == self.rules.metrics_layout.sha256
        if pooled != (split == "validation"):
            raise Rejected(f"site {self.name} gives sums of validation patients, and its own results of test patients")
        if not pooled and not self.rules.egress.per_site_results:
            raise Withheld(f"site {self.name} withholds its own results: egress.per_site_results is false")
        learner = self.learner
        which = header.meta.get("evaluator")
        if which is None:
            learner.load(self._to_measure(request), self._memory(header.round))
            values = learner.held_out.evaluate(split)
        elif which in self._evaluators:
            self._own.row(header)
            carried = self._to_measure(request) if header.body_nbytes else None
            values = self._evaluators[which](learner, carried, header.meta, split)
        else:
            raise WireError(f"site {self.name} has no evaluator of that name")
        layout = self.rules.metrics_layout if pooled else self.rules.evaluation_layout
        if pooled:
            metrics = self._validation_sums(header.round, values)
        else:
            metrics = self._own.entries(header, values, learner, self._rounding_root)
        random = public_generator(self.rules.seed, self.name, "no rounding")
        return encode(layout, {}, {}, {}, metrics, random), layout

    def _to_measure(self, request: Message) -> TensorFile:
        """The model that a request carries; a second one is refused.

        Means of many, chosen to differ at will, would tell patients apart. An arm has one model that is tested, in one
        way, and one a round that is validated; those are measured as often as asked. Where the study trains nothing, it
        is the model that the site has itself.
        """
        header, state = request.header, self.public_state(request)
        if self.rules.given and not self.learner.begins_with(state):
            raise Rejected(
                f"site {self.name} is asked to measure another model than the one that the study starts from, and the "
                "study trains nothing (schedule.rounds is 0)"
            )
        if header.meta.get("split") == "test":
            # The private part that completes a model is another one in another round, and none for a stranger.
            how = [header.meta.get("evaluator"), bool(header.meta.get("unseen_site")), header.round]
            self._measure_once("test", 0, digest([header.body_sha256, *how]), header)
        else:
            if self.aborted.saw(header.round):
                raise Rejected(f"site {self.name} is asked to validate round {header.round}, which was aborted")
            # Served as a released one, a model has another private part, or none.
            which = header.meta.get("evaluator")
            served = () if which is None else (which, bool(header.meta.get("unseen_site")))
            self._measure_once("validation", header.round, header.body_sha256, header, served)
        return state

    def _weigh(self, header: Header, learner: Learner) -> None:
        """Raise unless a validation loss may leave, as a weight say: it is a mean over the validation patients, of the
        model that the site trains, so it leaves by the rules of their sums, and one a round."""
        patients = np.empty(learner.dataset.patients("validation"))
        if (why := self._own.withheld("validation", {LOSS: patients}, learner)) is not None:
            raise Withheld(
                f"site {self.name} withholds {learner.measured.what}: {why}. {learner.measured.instead}, or the site "
                "more validation patients"
            )
        # What is trained follows from the start, the round and, by the aborted rounds, what the site remembers.
        self._measure_once(
            "weight", header.round, digest([header.body_sha256, sorted(aborted_numbers(header))]), header
        )

    def _measure_once(
        self,
        what: Literal["test", "validation", "weight"],
        number: int,
        model: str,
        header: Header,
        how: Sequence[Any] = (),
    ) -> None:
        # The bytes alone are no model: by other tables, many can be read from one body.
        word = digest([model, *how, [info.to_json() for info in header.tensors]])
        # Earlier versions gave their word on the bytes.
        if self.store.write_once(f"measured/{what}", number, word) not in (word, model):
            gives = "one weight by validation loss" if what == "weight" else f"{what} sums of one model"
            raise Rejected(
                f"site {self.name} has measured another model: it gives {gives} of {_EACH[what]}. To measure others, "
                "start a run in another folder"
            )

    def _release(self, request: Message) -> SiteReply:
        """Write the private part of the released model into the site's own folder."""
        # Another round's part would be another model to test, and would take the place of the released one.
        word = digest([request.header.round, sorted(aborted_numbers(request.header))])
        if self.store.written_value("released") not in (None, word):
            raise Rejected(f"site {self.name} has written its part of the released model of another round")
        memory = self._memory(request.header.round)
        tensors = self.learner.local_tensors(memory)
        if not tensors:
            return SiteReply(request.reply(DONE))
        if self.folder is not None:
            try:
                with written(self.folder / "local.safetensors") as file:
                    file.write(save(tensors))
            except OSError as error:
                raise disk_error(error) from error
        self.store.write_once("released", 0, word)
        said = tensors_sha256(tensors)
        if self.rules.rounding_root is None:
            # A bare hash would let a coordinator test guesses of the data that the part was trained on.
            said = SecretRoot(self._rounding_root).key("local", said).hex()
        return SiteReply(request.reply(DONE, meta={LOCAL_SHA256: said}))

    def _validation_sums(self, number: int, values: Mapping[str, Array]) -> dict[str, Any]:
        """Sums that are pooled over sites; of no patient where the site's rules withhold them."""
        if (why := self._own.withheld("validation", values, self.learner)) is not None:
            self.minutes.note("blocked", {"kind": "validation", "round": number, "reason": why})
            return {}
        stays = self._own.kept_back("validation", number, values, self.learner, hidden=self.rules.hidden)
        leaving = {name: rows for name, rows in values.items() if name not in stays}
        return validation_sums(self.learner.task.metrics, leaving)

    def close(self) -> None:
        """Close the store."""
        with suppress(WardroundError):
            self.store.close()


def _record(name: str, identity: str, store: SiteStore) -> HashLog:
    begun = begun_by(store.enrol(), (SENT,), study=identity, site=name)
    return HashLog(store.root / LOG, f"site {name}", begun, lambda: store.identity, store.tail)


def _seen_scales(header: Header) -> dict[str, str]:
    """What the site keeps of the scales of a round that it trained in."""
    return {_SCALES: json.dumps(remembered(header.round, scales_in(header.meta)))}
