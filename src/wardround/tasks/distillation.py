"""A released model that teaches another network: what it says of a batch, and how far the network is from that.

Hinton et al., *Distilling the knowledge in a neural network*, 2015, section 2: probabilities of both are softened by a
temperature T, and their divergence is multiplied by T^2, since its gradients shrink as 1 / T^2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from wardround.errors import StudyError
from wardround.study.normalise import ZScore
from wardround.study.teacher import TaughtBy
from wardround.tasks.task import Task
from wardround.wire.host import on_host

# Bytes of a teacher's answers that a process keeps.
CAPACITY = 2**28
_binary = nn.functional.binary_cross_entropy_with_logits


@dataclass(frozen=True, eq=False)
class Teacher:
    """A released model that teaches: its task, and its network in evaluation mode, which no gradient reaches."""

    task: Task
    network: nn.Module
    _placed: dict[torch.device, nn.Module] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.network.eval().requires_grad_(False)

    def on(self, device: torch.device) -> nn.Module:
        """The network on a device, copied there once."""
        if device not in self._placed:
            here = next(self.network.parameters()).device == device
            self._placed[device] = self.network if here else deepcopy(self.network).to(device)
        return self._placed[device]

    @property
    def nbytes(self) -> int:
        """Of its values."""
        return sum(tensor.nbytes for tensor in self.network.state_dict().values())


@dataclass(frozen=True, eq=False)
class Said:
    """What a teacher says of a batch, in the order of the student's outputs and on its grid.

    logits: (B, K) or (B, K, *shape); counts: (B, K), 1 where it says something.
    """

    logits: Tensor
    counts: Tensor


class Lesson(Protocol):
    """How a teacher of one task teaches a network of another: which of its inputs and outputs are whose."""

    def says(self, network: nn.Module, images: Tensor, masks: Tensor | None) -> Said:
        """What the teacher's network says of the student's images (B, C, *shape).

        `masks` (B, K, *shape) are what is drawn in them, where anything is.
        """
        ...


@runtime_checkable
class Student(Protocol):
    """A task whose network a released model may teach."""

    def learn_from(self, teacher: Callable[[], Teacher]) -> None:
        """Take the teacher from this, once it is needed: what learns nothing needs none."""
        ...

    def check_teacher(self) -> None:
        """Take it now. Raises `StudyError` where it is not there, is another than the study's, or does not fit."""
        ...


@runtime_checkable
class Teaches(Protocol):
    """A task whose released models may teach the network of another."""

    def lesson_for(self, student: Any) -> Lesson:
        """How its network teaches that of a task of the settings `student`.

        Raises `StudyError` where what the two see or say cannot be brought together.
        """
        ...


class Distillation:
    """The loss of a task with a teacher; without one the task's own.

    A study that names a teacher is read by many who have none, to apply its model or to read its results: the teacher
    is taken when the first loss is asked for. Where examples come again as they were (`repeats`), what it says of each
    is computed once, for each alone, and kept as far as `capacity` bytes go: a run that goes on after a stop gives the
    same bits. That is on the CPU and in 32 bits; elsewhere, and of changed examples, it is computed in each step.
    """

    def __init__(
        self,
        student: Any,
        teacher: Callable[[], Teacher] | None = None,
        *,
        repeats: bool = False,
        capacity: int = CAPACITY,
    ) -> None:
        self._student = student
        self._take = teacher
        self._repeats = repeats
        self._room = capacity
        self._kept: dict[bytes, Said] = {}

    @property
    def settings(self) -> TaughtBy | None:
        """What the study says of its teacher; `None` where there is none, or nothing is learned from it."""
        found: TaughtBy | None = self._student.taught_by
        return found

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher. Raises `StudyError` where it is not there, or is another than the study's."""
        if self._take is None:
            raise StudyError("task.teacher: what trains this task must give it the teacher (`learn_from`)")
        return self._take()

    @cached_property
    def lesson(self) -> Lesson:
        """How it teaches. Raises `StudyError` where it does not fit the task."""
        task = self.teacher.task
        if not isinstance(task, Teaches):
            raise _unfit(f"a model of task.kind {task_kind(task)} teaches no other")
        return task.lesson_for(self._student)

    def loss(
        self, own: Tensor, logits: Tensor, images: Tensor, masks: Tensor | None = None, *, exclusive: bool
    ) -> Tensor:
        """alpha x own + (1 - alpha) x divergence from the teacher: scalar.

        `logits` (B, K, ...) are the network's of `images`; `exclusive` where one of the K is true, not each by itself.
        """
        chosen = self.settings
        if chosen is None:
            return own
        with torch.no_grad():
            said = self._says(images, masks)
        distance = softmax_distillation if exclusive else binary_distillation
        learned = distance(logits, said, chosen.temperature)
        return chosen.alpha * own + (1.0 - chosen.alpha) * learned

    def _says(self, images: Tensor, masks: Tensor | None) -> Said:
        network = self.teacher.on(images.device)
        if not self._repeats or images.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return self.lesson.says(network, images, masks)
        drawn = [None] * len(images) if masks is None else list(masks)
        each = [self._of(network, *pair) for pair in zip(images, drawn, strict=True)]
        return Said(torch.cat([said.logits for said in each]), torch.cat([said.counts for said in each]))

    def _of(self, network: nn.Module, image: Tensor, mask: Tensor | None) -> Said:
        key = hashlib.blake2b(on_host(image).tobytes(), digest_size=32)
        key.update(b"" if mask is None else on_host(mask).tobytes())
        found = self._kept.get(key.digest())
        if found is None:
            found = self.lesson.says(network, image[None], None if mask is None else mask[None])
            if (size := found.logits.nbytes + found.counts.nbytes) <= self._room:
                self._room -= size
                self._kept[key.digest()] = found
        return found


def softmax_distillation(logits: Tensor, said: Said, temperature: float) -> Tensor:
    """T^2 KL(softmax(v / T) || softmax(z / T)), logits z and v of network and teacher (B, K); mean over B: scalar."""
    teacher = torch.log_softmax(said.logits.float() / temperature, dim=1)
    student = torch.log_softmax(logits / temperature, dim=1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(dim=1).mean()


def binary_distillation(logits: Tensor, said: Said, temperature: float) -> Tensor:
    """T^2 KL of Bernoulli variables, logits z and v (B, K, *shape): mean over *shape, then over B and K; scalar.

    An output of which the teacher says nothing counts 0 in the mean, so that no example's part depends on another's.
    """
    teacher = said.logits.float() / temperature
    share = torch.sigmoid(teacher)
    # The cross-entropy less the teacher's own entropy.
    each = _binary(logits / temperature, share, reduction="none") - _binary(teacher, share, reduction="none")
    each = each.flatten(2).mean(dim=2) if each.ndim > 2 else each
    return temperature**2 * (each * said.counts).mean()


# What fits ------------------------------------------------------------------------------------------------------------


def order_of(student: Sequence[str], teacher: Sequence[str], key: str) -> list[int]:
    """Where a teacher has each of a student's outputs; raises `StudyError` for one that it lacks."""
    lacking = [name for name in student if name not in teacher]
    if lacking:
        raise _unfit(
            f"it does not know {', '.join(lacking)} of {key}, only {', '.join(teacher)}; name what it knows, or choose "
            "another teacher"
        )
    return [list(teacher).index(name) for name in student]


def channels_of(student: Any, teacher: Any) -> list[int]:
    """Which channels of a student's images a teacher sees; both are settings of images. Raises `StudyError`."""
    if student.dimensions != teacher.dimensions:
        raise _unfit(
            f"it sees {teacher.dimensions} dimensions, and task.dimensions is {student.dimensions}; choose another"
        )
    if student.images == teacher.images and student.channels == teacher.channels:
        return list(range(student.channels))
    each_a_file = len(student.images) == student.channels and len(teacher.images) == teacher.channels
    if each_a_file and set(teacher.images) <= set(student.images):
        return [student.images.index(name) for name in teacher.images]
    raise _unfit(
        f"it sees {teacher.channels} channels, of {', '.join(teacher.images)}, and the study's images have "
        f"{student.channels}, of {', '.join(student.images)}; name at task.images what it sees, a file a channel"
    )


def grid_scale(student: Any, teacher: Any) -> tuple[float, ...]:
    """How many of a teacher's voxels one of a student's is along each axis, by how their images are resampled.

    Raises `StudyError` where only one of the two studies says it.
    """
    for name, mine, theirs in (
        ("resize", student.resize, teacher.resize),
        ("spacing", teacher.spacing, student.spacing),
    ):
        if (mine is None) != (theirs is None):
            raise _unfit(f"one of the two studies has task.{name}, so that its voxels have another size; set both")
    pairs: tuple[tuple[float, float], ...] = ()
    if student.resize is not None:
        pairs = tuple(zip(teacher.resize, student.resize, strict=True))
    elif student.spacing is not None:
        pairs = tuple(zip(student.spacing, teacher.spacing, strict=True))
    return tuple(above / below for above, below in pairs) or (1.0,) * student.dimensions


def task_kind(task: Any) -> str:
    """The kind of a task, for people."""
    return str(getattr(getattr(task, "config", None), "kind", type(task).__name__))


def check_scale(student: Any, teacher: Any) -> None:
    """Raise `StudyError` where two tasks' settings normalise images differently: the teacher sees the student's."""
    plain = ZScore()
    if getattr(student, "normalise", plain) != getattr(teacher, "normalise", plain):
        raise StudyError(
            "task.teacher: it learned from images that were normalised otherwise (task.normalise) and would see this "
            "study's; give both studies one `task.normalise`, or take another teacher"
        )


def unfit_kind(student: Any, teacher: Any) -> StudyError:
    """The error of a teacher whose task is too unlike the student's."""
    return _unfit(f"a model of task.kind {teacher.kind} does not teach one of task.kind {student.kind}")


def _unfit(why: str) -> StudyError:
    return StudyError(f"task.teacher: the released model does not fit this study: {why}")
