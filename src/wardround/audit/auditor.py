"""One audit at a site: what its own updates and its model give away, attacked before anybody else does."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wardround.audit.epsilon import Bound, Claim, audit_mechanism, gaussian_mechanism
from wardround.audit.inversion import ATTACKS, Attack, Recovered, Victim, invert
from wardround.audit.membership import Membership, infer_membership
from wardround.audit.properties import Property, probe
from wardround.audit.results import PARTS, Audit, Control, Part, Pictured
from wardround.audit.scores import Row, Trial, row, score
from wardround.audit.subject import claimed, held_out_alike, model_file
from wardround.audit.victims import Noise, control_victim, is_scan, singles, victim_of
from wardround.errors import DataError, StudyError
from wardround.federation.release import model_of_study, personal_part
from wardround.learning.examples import ExampleStream, SiteExamples
from wardround.learning.frozen import train_mode
from wardround.learning.methods.method import MODEL
from wardround.learning.optimizer import build_optimizer
from wardround.plan.arms import FEDERATED
from wardround.protection.lint import Finding, architecture_sha256, lint_against
from wardround.runs.machine import NOWHERE, Machine
from wardround.storage.store import NOTHING
from wardround.study.load import plan_sha256, study_sha256
from wardround.study.places import NO_PLACES, Places
from wardround.study.schema import Study
from wardround.study.sites import SitesFile
from wardround.tasks.reconstruction import ReconstructionDataset
from wardround.tasks.task import Batch, Split
from wardround.wire.random import public_generator
from wardround.wire.tensors import tensors_sha256

# The parts that attack images of scans, and why a task of another kind has none of them.
OF_SCANS: tuple[Part, ...] = ("inversion", "membership", "properties")
_NO_SCANS = (
    "not attacked, because this part knows scans of MRI and CT reconstruction alone; that says nothing of what such "
    "updates give away"
)


@dataclass(frozen=True)
class Effort:
    """How long an audit tries; `trials` updates for each attack on one step, no `references`: none of their attacks."""

    trials: int
    iterations: int
    restarts: int
    local_steps: int
    pool: int
    references: int
    reference_steps: int
    members: int

    @staticmethod
    def of(*, quick: bool, trials: int | None = None) -> Effort:
        """The effort of a quick or a full audit."""
        effort = Effort(2, 60, 1, 2, 24, 0, 0, 24) if quick else Effort(4, 120, 1, 3, 48, 4, 600, 64)
        return effort if trials is None else replace(effort, trials=trials)

    def limit(self, attack: Attack) -> Attack:
        """An attack that tries no longer."""
        most = self.restarts + 1 if attack.group else self.restarts
        return replace(attack, iterations=min(attack.iterations, self.iterations), restarts=min(attack.restarts, most))


class Auditor:
    """Runs the attacks at one site."""

    def __init__(
        self,
        study: Study,
        sites: SitesFile,
        site: str,
        effort: Effort,
        *,
        model: Path | None = None,
        attacks: Sequence[Attack] = ATTACKS,
        claim: Claim | None = None,
        places: Places = NO_PLACES,
    ) -> None:
        if not study.trains:
            raise StudyError("the study trains nothing (schedule.rounds is 0), so no site sends an update to audit")
        if site not in study.training_sites:
            raise StudyError(f"--site {site}: only a site that trains sends updates; choose among "
                             f"{', '.join(study.training_sites)}")  # fmt: skip
        self.study, self.site, self.effort = study, site, effort
        self.attacks = tuple(effort.limit(attack) for attack in attacks)
        self._host = Machine(held_out_alike(study), sites, NOWHERE, (), places=places)
        opened = self._host.plugins.opened(study)
        self._hashes = study_sha256(opened), plan_sha256(opened)
        self._path = model_file(model)
        self.tensors = self._host.model_context.initial_values()
        if self._path is not None:
            self.tensors = {
                **self.tensors,
                **model_of_study(self._path, *self._hashes),
                **personal_part(self._path, site),
            }
        self._dataset = self._host.dataset(site)
        if not len(self._dataset):
            raise DataError(f"site {site} has no training example to audit")
        self.claim = claim or claimed(study, site, self._dataset)
        self.pictures: list[Pictured] = []
        self.skipped: list[str] = []

    # Parts -------------------------------------------------------------------------------------------------------

    @cached_property
    def lint(self) -> tuple[Finding, ...]:
        """What is suspicious about the model."""
        return lint_against(self.tensors, self._host.model_context.initial_values())

    @cached_property
    def pool(self) -> Tensor:
        """The site's images that an adversary would have to tell apart: (M, H, W)."""
        return torch.cat([self._batch(i).target for i in self._spread(self.effort.pool)])

    def controls(self) -> tuple[Control, ...]:
        """Every attack on an image that is known to leak."""
        return tuple(self._control(attack) for attack in self.attacks)

    def inversions(self, controls: Sequence[Control]) -> tuple[Row, ...]:
        """Every attack on every kind of update that it is made for."""
        works = {control.attack: control.works for control in controls}
        rows = []
        for variant, attack, victims in self._variants():
            trials = [self._trial(variant, attack, victim, number) for number, victim in enumerate(victims)]
            rows.append(row(variant, attack.name, trials, len(self.pool), works=works[attack.name]))
        return tuple(rows)

    def membership(self) -> tuple[Membership, ...]:
        """Training examples against validation and test examples of the same site, by three attacks."""
        if self._path is None:
            self.skipped.append("membership: give --model; a model that has not been trained knows nobody")
            return ()
        outsiders = list(islice(self._outsiders(), self.effort.members))
        if not outsiders:
            self.skipped.append("membership: the site has no validation or test patient to compare with")
            return ()
        members = [self._batch(i) for i in self._spread(self.effort.members)]
        batches = [*members, *outsiders]
        inside = np.arange(len(batches)) < len(members)
        self._load()
        losses = self._losses(batches)
        knows = np.zeros((self.effort.references, len(batches)), dtype=bool)
        references = np.zeros(knows.shape)
        for number in range(self.effort.references):
            random = public_generator(self.study.seed, self.site, "audit", "reference", number)
            # Pairs of references share nothing, so that every example has references that never saw it.
            drawn = random.permutation(len(batches)) < len(batches) // 2
            knows[number] = ~knows[number - 1] if number % 2 else drawn
            references[number] = self._reference_losses(batches, np.flatnonzero(knows[number]), random)
        if not self.effort.references:
            self.skipped.append(
                "membership by LiRA and RMIA: not run in quick mode, whose reference models would have learned nothing"
            )
        return infer_membership(losses, inside, references, knows)

    def properties(self) -> tuple[Property, ...]:
        """Contrasts where the study has several, and otherwise how much tissue an image shows."""
        if not isinstance(self._dataset, ReconstructionDataset):
            self.skipped.append("properties: the task's data say nothing of their acquisition")
            return ()
        splits: tuple[Split, ...] = ("train", "validation", "test")
        shown = [each for split in splits for each in self._dataset.middle(split)]
        self._load()
        patients = np.array([_patient for _patient, _, _ in shown])
        gradients = np.stack([self._flat(batch)[-self._last :] for _, _, batch in shown]).astype(np.float64)
        contrasts = np.array([contrast for _, contrast, _ in shown])
        names = list(dict.fromkeys(contrasts))
        if len(names) > 1:
            asked = {f"contrast is {name}": contrasts == name for name in (names if len(names) > 2 else names[:1])}
        else:
            tissue = np.array([float(batch.target.mean()) for _, _, batch in shown])
            asked = {"more signal than the median image": tissue > np.median(tissue)}
        found = [probe(name, gradients, has, patients) for name, has in asked.items()]
        if any(each is None for each in found):
            self.skipped.append("properties: too few patients to fit and test a probe")
        return tuple(each for each in found if each is not None)

    def epsilon(self) -> Bound | None:
        """Canaries in the mechanism that is claimed, beside the site's own gradients."""
        if self.claim is None:
            self.skipped.append(f"epsilon: {self._why_no_claim}")
            return None
        self._load()
        gradients = np.stack([self._flat(self._batch(i)) for i in self._spread(16)]).astype(np.float64)
        kept = np.random.default_rng(0).permutation(gradients.shape[1])[:4096]
        return audit_mechanism(self.claim, gaussian_mechanism(self.claim), gradients[:, kept])

    def run(self, *, quick: bool, parts: Sequence[Part] = PARTS) -> Audit:
        """The parts asked for, in order, after the lint, which is always done; `quick` is written down."""
        began = time.perf_counter()
        controls: tuple[Control, ...] = ()
        rows: tuple[Row, ...] = ()
        membership: tuple[Membership, ...] = ()
        properties: tuple[Property, ...] = ()
        epsilon: Bound | None = None
        if self.lint:
            self.skipped.append("everything but the lint: nobody should compute with this model")
        else:
            self.skipped += [f"{part}: not asked for" for part in PARTS if part not in parts]
            if not self._scans:
                beyond = [part for part in parts if part in OF_SCANS]
                self.skipped += [f"{part}: {_NO_SCANS}" for part in beyond]
                parts = [part for part in parts if part not in beyond]
            if "inversion" in parts:
                controls = self.controls()
                rows = self.inversions(controls)
            membership = self.membership() if "membership" in parts else ()
            properties = self.properties() if "properties" in parts else ()
            epsilon = self.epsilon() if "epsilon" in parts else None
        return Audit(
            study=self.study.name,
            study_sha256=self._hashes[0],
            plan_sha256=self._hashes[1],
            site=self.site,
            model="the initial weights of round 1" if self._path is None else f"the released model {self._path.name}",
            model_sha256=tensors_sha256(self.tensors),
            architecture_sha256=architecture_sha256(self.tensors),
            quick=quick,
            inverted="inversion" in parts and not self.lint,
            lint=self.lint,
            controls=controls,
            rows=rows,
            membership=membership,
            properties=properties,
            epsilon=epsilon,
            skipped=tuple(self.skipped),
            pool=len(self.pool) if self._scans else 0,
            seconds=time.perf_counter() - began,
            pictures=tuple(self.pictures),
        )

    # Updates -----------------------------------------------------------------------------------------------------

    def _variants(self) -> list[tuple[str, Attack, list[Victim]]]:
        effort, seed = self.effort, self.study.seed
        by_name = {attack.name: attack for attack in self.attacks}
        direct = [a for a in self.attacks if not a.unroll and a.name != "iDLG"]
        self.skipped.append("iDLG on the study's own updates: the task has no labels, so there are none to read")
        chosen = self._spread(effort.trials)
        strongest = by_name.get("Inverting Gradients")
        few = max(1, effort.trials // 2)
        noise = Noise(self.claim.clip, self.claim.noise_multiplier) if self.claim else Noise(1.0, 1.0)
        noisy = f"lone update, 1 image, DP noise {noise.multiplier:g} x clip {noise.clip:g}" + (
            "" if self.claim else " (if it were on)"
        )
        lone = [self._victim([i]) for i in chosen]
        found = [("lone update, 1 step, 1 image", attack, lone) for attack in direct]
        unrolled, steps = by_name.get("Unrolled"), effort.local_steps
        if unrolled is not None:
            several = [self._victim(self._neighbours(i, steps)) for i in chosen[:few]]
            found.append((f"lone update, {steps} local steps of SGD", unrolled, several))
        if strongest is not None:
            members = len(self.study.training_sites)
            summed = [self._victim([self._neighbours(i, members)]) for i in chosen[:few]]
            found.append((f"sum over {members} sites, 1 image each", strongest, summed))
            if self._shared_noise:
                self.skipped.append(f"lone update with DP noise: {self._why_no_claim}")
            else:
                found.append((noisy, strongest, [self._victim([i], noise, seed + i) for i in chosen[:few]]))
            if self.study.protection.privacy is None:
                found.append((f"as sent: {self._own_words}", strongest, [self._as_sent()]))
            else:
                self.skipped.append("the update as sent: making one more with privacy would spend of the budget")
        return found

    @property
    def _shared_noise(self) -> bool:
        """Whether the study's noise is in sums alone, and no other was claimed."""
        privacy = self.study.protection.privacy
        return self.claim is None and privacy is not None and privacy.noise == "distributed"

    @property
    def _why_no_claim(self) -> str:
        if self._shared_noise:
            return "sites share the study's noise, which covers sums over sites and no site's own update"
        return "no differential privacy is claimed, so there is no bound to test"

    @property
    def _own_words(self) -> str:
        local = self.study.local
        return f"{local.steps_of(len(self._dataset))} steps of {local.optimizer}, batch {local.batch}"

    def _victim(self, groups: Sequence[int | Sequence[int]], noise: Noise | None = None, seed: int = 0) -> Victim:
        """An update of one step for each group of examples."""
        self._load()
        batches = [self._batch(*([g] if isinstance(g, int) else g)) for g in groups]
        return victim_of(
            self._host.task, self._network, batches, self._shared, rate=self.study.local.lr, noise=noise, seed=seed
        )

    def _as_sent(self) -> Victim:
        """What the site's own training sends in round 1; the adversary looks for the images of the first steps."""
        arm_spec = self._host.arm_spec(FEDERATED)
        learner, local = self._host.learner(arm_spec, self.site), self.study.local
        public, _ = arm_spec.method.initial(arm_spec.layout.groups, self.tensors)
        learner.load(public, NOTHING)
        changes = learner.train(1, public, NOTHING).changes
        # Further groups may speak of the same tensors, such as control variates: the model's own count.
        groups = sorted(changes, key=lambda group: group == MODEL)
        merged = {name: change for group in groups for name, change in changes[group].items()}
        names = [n for n, p in self._network.named_parameters() if p.requires_grad and n in self._shared]
        sent = tuple(-torch.from_numpy(np.asarray(merged[name])) for name in names)
        self._load()
        stream = ExampleStream(len(self._dataset), self.study.seed, self.site)
        indices = SiteExamples(stream).of_round(1, local.steps_of(len(self._dataset)) * local.batch)
        batches = [
            self._dataset.batch(
                indices[step * local.batch : (step + 1) * local.batch],
                public_generator(self.study.seed, self.site, 1, step, "augmentation"),
            )
            for step in range(min(local.steps_of(len(self._dataset)), self.effort.local_steps))
        ]
        return victim_of(self._host.task, self._network, batches, self._shared, sent=sent)

    @cached_property
    def _scans(self) -> bool:
        """Whether the task's examples are scans, whose images the attacks look for."""
        return is_scan(self._batch(0))

    # What they share ---------------------------------------------------------------------------------------------

    @property
    def _network(self) -> torch.nn.Module:
        return self._host.model_context.model

    @cached_property
    def _shared(self) -> frozenset[str]:
        return frozenset(self._host.arm_spec(FEDERATED).policy.names("shared"))

    @property
    def _last(self) -> int:
        """Values in the last layer that is sent: its weight and its bias."""
        sent = [p for n, p in self._network.named_parameters() if p.requires_grad and n in self._shared]
        return sum(p.numel() for p in sent[-2:])

    def _load(self) -> None:
        with torch.no_grad():
            for name, tensor in self._network.state_dict().items():
                tensor.copy_(torch.from_numpy(np.asarray(self.tensors[name])))

    def _batch(self, *indices: int) -> Batch:
        return self._dataset.batch(indices, public_generator(self.study.seed, self.site, "audit", *indices))

    def _spread(self, count: int) -> list[int]:
        """So many training examples, evenly over the site's."""
        size = len(self._dataset)
        return [int(i) for i in np.unique(np.linspace(0, size - 1, min(count, size)).round())]

    def _neighbours(self, start: int, count: int) -> list[int]:
        """So many examples far from each other, the first being `start`."""
        size = len(self._dataset)
        return [(start + k * max(1, size // count)) % size for k in range(count)]

    def _outsiders(self) -> Iterator[Batch]:
        splits: tuple[Split, ...] = ("validation", "test")
        for split in splits:
            for _, batch in self._dataset.evaluation(split):
                yield from singles(batch)

    def _flat(self, batch: Batch) -> Any:
        """The update of one example as one vector."""
        if not self._scans:
            return self._gradient(batch)
        victim = victim_of(self._host.task, self._network, [batch], self._shared)
        return torch.cat([g.flatten() for g in victim.sent]).numpy()

    def _gradient(self, batch: Batch) -> Any:
        """The same of a task of any kind, by its own loss."""
        train_mode(self._network)
        self._network.zero_grad()
        self._host.task.loss(self._network, batch).backward()  # type: ignore[no-untyped-call]
        sent = [p for n, p in self._network.named_parameters() if p.requires_grad and n in self._shared]
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in sent]).numpy()

    @torch.no_grad()
    def _losses(self, batches: Sequence[Batch]) -> Any:
        self._network.eval()
        return np.array([float(self._host.task.loss(self._network, batch)) for batch in batches])

    def _reference_losses(self, batches: Sequence[Batch], known: Any, random: np.random.Generator) -> Any:
        """Train a reference from the study's initial weights on the examples it may know; its losses on all."""
        task, model_context = self._host.task, self._host.model_context
        with torch.no_grad():
            for name, tensor in self._network.state_dict().items():
                tensor.copy_(model_context.initial[name])
        train_mode(self._network)
        optimizer = build_optimizer((self._network,), self.study.local)
        for index in random.choice(known, self.effort.reference_steps):
            optimizer.zero_grad(set_to_none=True)
            task.loss(self._network, batches[int(index)]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return self._losses(batches)

    def _control(self, attack: Attack) -> Control:
        images = self.pool[: self.effort.trials]
        trials, right = [], 0
        for number, image in enumerate(images):
            victim = control_victim(image, number)
            found = invert(attack, victim, number)
            trials.append(float(score(found.images, victim.images, None, victim.images).ssim[0]))
            if found.labels is not None and victim.labels is not None:
                right += int(torch.equal(found.labels, victim.labels))
        return Control(attack.name, len(trials), float(np.median(trials)), float(max(trials)), right)

    def _trial(self, variant: str, attack: Attack, victim: Victim, number: int) -> Trial:
        self._load()
        train_mode(self._network)
        found: Recovered = invert(attack, victim, number)
        if number == 0:
            self.pictures.append(Pictured(variant, attack.name, victim.images[0], found.images[0]))
        return score(found.images, victim.images, victim.masks, self.pool)
