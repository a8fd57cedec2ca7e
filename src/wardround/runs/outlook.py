"""`wardround plan`: what a study takes of each site and round in bytes, memory, disk and time, before anything runs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from wardround.errors import StudyError
from wardround.federation.expected import Expected, expected
from wardround.learning.footprint import Footprint, footprint
from wardround.plan.arms import FEDERATED
from wardround.results.units import human_bytes, human_seconds
from wardround.runs.columns import entry, table, wrapped
from wardround.runs.explain_plugins import roles_of, uncalled
from wardround.runs.machine import NOWHERE, Machine
from wardround.runs.session import open_host
from wardround.site.memory import GIGABYTE, footprint_of
from wardround.study.load import load_study
from wardround.study.schema import Local
from wardround.study.sites import SiteData, SitesFile, load_sites
from wardround.study.start import Fresh, Start
from wardround.tasks.task import Predicts, PredictsScans

BANDWIDTHS = ("10Mbit/s", "100Mbit/s", "1Gbit/s")
_BANDWIDTH = re.compile(r"(\d+(?:\.\d+)?) ?([kMG]?)(bit|B)/s")
_PREFIX = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
_HOW = {
    "meta": "counted in two steps on torch's meta device, where tensors have sizes and no values, in 32 bits",
    "cpu": "counted in two steps on the CPU, as the task reads values while it trains",
    "cuda": "read from the GPU's own counter after two steps on it",
}


@dataclass(frozen=True)
class Outlook:
    """What a study takes, and by site that trains the memory of its training and the site's room for it in GB."""

    text: str
    memory: Mapping[str, tuple[Footprint, float | None]]


def outlook(
    study_file: Path,
    sites_file: Path | None,
    bandwidths: Sequence[str],
    compare: Sequence[str],
    overrides: Sequence[str],
    *,
    allow_code: bool = False,
) -> Outlook:
    """What a study takes of each site.

    Without a sites file no data are opened. With one, the memory of training is that with each site's own images: the
    file of a single site is enough, at that site. Raises `StudyError` and `DataError` for what would stop the run.
    """
    speeds = {text: bits_of(text) for text in bandwidths or BANDWIDTHS}
    study, near = load_study(study_file, overrides), study_file.parent
    given = None if sites_file is None else load_sites(sites_file)
    known = {} if given is None else {name: entry for name, entry in given.sites.items() if name in study.sites}
    # Sites that this machine knows nothing of take part, and are not opened.
    whole = {name: known.get(name) or SiteData(data=(Path(),)) for name in study.sites}
    sites = SitesFile(sites=whole)
    # Values have no size of their own: what the study starts from need not be here yet.
    fresh = study.model_copy(update={"start": Fresh()})
    host = open_host(fresh, sites, NOWHERE, compare, (), None, allow_code=allow_code, near=near)
    if (text := uncalled(host)) is not None:
        return Outlook(text, {})
    bill = expected(host)
    unknown = cache(partial(_memory_by_study, host))
    memory = {name: _memory(host, name) if name in known else unknown() for name in study.training_sites}
    training = (
        f"Messages of a round\n{_rounds(host, bill, speeds)}",
        f"All messages\n{_all(host, bill, speeds)}",
        f"Memory of training\n{_memories(memory, host.arm_spec(FEDERATED).arm.local)}",
    )
    measuring = f"All messages\n{_all(host, bill, speeds)}", f"Memory\n{_memory_of_given(host)}"
    sections = (
        f"Study {study.name}: what it takes, before anything runs",
        *(training if study.trains else measuring),
        f"Disk\n{_disk(host, bill, study.start)}",
    )
    rooms = {name: known[name].memory if name in known else None for name in memory}
    return Outlook("\n\n".join(sections), {name: (found, rooms[name]) for name, found in memory.items()})


def bits_of(text: str) -> float:
    """Bits a second of `100Mbit/s`, `1.5 GB/s`, ...; raises `StudyError` for anything else, and for none at all."""
    found = _BANDWIDTH.fullmatch(text.strip())
    if found is None or not float(found[1]):
        raise StudyError(f"--bandwidth {text}: write a number and bit/s or B/s, as in 100Mbit/s, 1.5Gbit/s or 20MB/s")
    return float(found[1]) * _PREFIX[found[2]] * (8 if found[3] == "B" else 1)


def _rounds(host: Machine, bill: Expected, speeds: Mapping[str, float]) -> str:
    """A row for each site: sites of one role differ by the length of their names alone."""
    rows, roles = [], roles_of(host.study)
    for name, site in host.study.sites.items():
        of_round = bill.of_round(site.role)
        down, up = of_round.down.total, of_round.up.total
        times = [_seconds(down + up, bits) for bits in speeds.values()]
        rows.append((name, roles[site.role].partition(":")[0], human_bytes(down), human_bytes(up), *times))
    kinds = [
        f"{kind.replace('_', ' ')} {human_bytes(getattr(bill.training.down, kind))} / {human_bytes(count)}"
        for kind, count in vars(bill.training.up).items()
        if count or getattr(bill.training.down, kind)
    ]
    lines = [
        table(("site", "role", "to it", "from it", *(f"at {text}" for text in speeds)), rows),
        wrapped(f"To and from a site that trains, by what it is: {', '.join(kinds)}.", "  "),
    ]
    if bill.secure:
        lines.append(wrapped("Keys and shares of the secure sum come on top: some kB, more with more sites.", "  "))
    return "\n".join(lines)


def _all(host: Machine, bill: Expected, speeds: Mapping[str, float]) -> str:
    """What every site, and the coordinator's own line, carries in the whole run."""
    rounds, every = host.study.schedule.rounds, host.study.schedule.validate_every
    rows, total = [], 0
    late, training = host.study.schedule.asynchronous, len(host.study.training_sites)
    for name, site in host.study.sites.items():
        count = bill.in_all(site.role, rounds, every)
        total += count
        rows.append((name, human_bytes(count), *(_seconds(count, bits) for bits in speeds.values())))
    if late is not None:
        # A site may be in every round, and all together are in as many as rounds have updates; those that are left out
        # come on top.
        of_round = bill.of_round("train")
        total -= rounds * (training - late.buffer) * (of_round.down.total + of_round.up.total)
    rows.append(("coordinator", human_bytes(total), *(_seconds(total, bits) for bits in speeds.values())))
    arms = f" {len(host.arms)} arms: each other's rounds are as those of the federation." if len(host.arms) > 1 else ""
    tests = "the tests of every arm's model"
    what = f"{rounds} rounds of the federation, and {tests} with the delivery of the released one"
    note = (
        f"{what if rounds else 'The test of the given model, and its delivery'} "
        f"({human_bytes(bill.tests.down.total)} to each site). A line with one site's bandwidth carries all messages "
        f"of the coordinator one after another.{arms}"
    )
    if late is not None:
        note += (
            f" Rounds are asynchronous: each has {late.buffer} updates of {training} sites. A site's row is of one "
            "that is in every round; a slow one carries less. Updates that come too late are on top."
        )
    return "\n".join([table(("party", "in all", *(f"at {text}" for text in speeds)), rows), wrapped(note, "  ")])


def _seconds(nbytes: int, bits: float) -> str:
    return human_seconds(8 * nbytes / bits)


def _memory(host: Machine, site: str) -> Footprint:
    """Of a site whose data this machine has, with its images."""
    return footprint_of(host, host.dataset(site), host.agent(site).held.compute)


def _memory_by_study(host: Machine) -> Footprint:
    """Of any site, with images of the size that the study says; without a step where it does not say it."""
    arm_spec, task = host.arm_spec(FEDERATED), host.task
    local, shared = arm_spec.arm.local, arm_spec.policy.names("shared")
    if not isinstance(task, Predicts) or isinstance(task, PredictsScans):
        return footprint(host.model_context, shared, local, None, own=arm_spec.own, holds=arm_spec.method.copies)
    shape = (local.pieces[0], *task.input_shape())

    def step(model: nn.Module, device: torch.device) -> Tensor:
        found: Tensor = model(torch.zeros(shape, device=device))
        return found.float().square().mean()

    return footprint(host.model_context, shared, local, step, own=arm_spec.own, holds=arm_spec.method.copies)


def _memories(memory: Mapping[str, Footprint], local: Local) -> str:
    rows = [
        (
            name,
            human_bytes(found.model),
            human_bytes(found.frozen),
            human_bytes(found.copies),
            human_bytes(found.gradients),
            human_bytes(found.optimizer),
            "not known" if found.step is None else human_bytes(found.step),
            ("at least " if found.step is None else "") + human_bytes(found.total),
        )
        for name, found in memory.items()
    ]
    head = ("site", "model", "frozen", "copies", "gradients", "optimiser", "step", "in all")
    return "\n".join([table(head, rows), *(wrapped(line, "  ") for line in _memory_notes(memory, local))])


def _memory_of_given(host: Machine) -> str:
    """Of a model that is only measured: no gradient and no optimiser, and what libraries take is on top."""
    whole = sum(p.info.nbytes for p in host.model_context.parameters)
    frozen = sum(p.info.nbytes for p in host.model_context.parameters if p.name in host.model_context.frozen)
    return wrapped(
        f"Nothing is trained: at a site the model and its initial values take {human_bytes(2 * whole - frozen)}, and "
        "what the network computes of an image comes on top, as does the reading of images.",
        "  ",
    )


def _memory_notes(memory: Mapping[str, Footprint], local: Local) -> Iterator[str]:
    yield (
        "In all: the model with its frozen part (once), copies (initial values and the start of the round) and the "
        "step, in which gradients, the optimiser's state and activations are at their peak."
    )
    if local.accumulate > 1:
        yield f"A batch of {local.batch} passes in pieces of {local.pieces[0]} examples (local.accumulate)."
    if local.checkpoint:
        yield "Blocks forget what they compute and compute it again for the gradient (local.checkpoint)."
    for how in dict.fromkeys(found.how for found in memory.values()):
        named = ", ".join(name for name, found in memory.items() if found.how == how)
        if how is None:
            yield f"The step of {named} depends on its data: add --sites, at the site."
        else:
            yield f"The step of {named} was {_HOW[how]}."
    taught = {name: found.teacher for name, found in memory.items() if found.teacher}
    if taught:
        yield f"In all there is a teacher, too: {human_bytes(max(taught.values()))} at {', '.join(taught)}."
    yield "What libraries, kernels and the reading of images take comes on top, and one process serves several sites."


def _disk(host: Machine, bill: Expected, start: Start) -> str:
    """Of what is written for good; both parties need as much again while a file takes another's place."""
    study, spec = host.study, host.arm_spec(FEDERATED)
    sizes = {p.name: p.info.nbytes for p in host.model_context.parameters}
    frozen = sum(sizes[name] for name in host.model_context.frozen)
    whole = sum(sizes.values()) - frozen
    public = sum(sizes[name] for name in spec.policy.names("shared"))
    trained = sum(p.info.nbytes for p in host.model_context.parameters if p.trainable)
    slots = 2 if study.local.optimizer != "sgd" else int(study.local.momentum > 0)
    kept = slots * trained if study.local.optimizer_state == "keep" else 0
    kept += spec.method.stores * public
    private = sum(sizes[name] for name in (*spec.policy.names("local"), *spec.own))
    arms = [arm for arm in host.arms.values() if not arm.inside(study)]
    # The states of the last rounds and the best one, the released model and what sites are sent of it.
    late = study.schedule.asynchronous
    # Late updates may come to as many of the last ones, and sites be at work on older ones still.
    states = study.schedule.keep if late is None else max(study.schedule.keep, late.max_staleness + 1)
    coordinator = frozen + len(arms) * ((states + 1) * public + 2 * whole)
    site = frozen + whole + bill.training.up.total + private + kept
    base = "" if isinstance(start, Fresh) else " Its copy of what the study starts from comes on top."
    return "\n".join(
        (
            entry("a site", f"about {human_bytes(site)}: its last answer, what it keeps, the released model.{base}"),
            entry("coordinator", f"about {human_bytes(coordinator)}, of {len(arms)} arm{'s' if len(arms) > 1 else ''}"),
        )
    )


def room_of(found: Outlook) -> str:
    """A line for the sites whose file says how much memory they have, and that have enough; empty without any."""
    rooms = [
        f"{site} {human_bytes(taken.total)} of {human_bytes(room * GIGABYTE)}"
        for site, (taken, room) in found.memory.items()
        if room is not None
    ]
    return f"Room: {', '.join(rooms)}." if rooms else ""
