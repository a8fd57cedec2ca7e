"""A released model that teaches another: the loss against its paper, what of it stays where it is, and whole runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tests.apart import apart, comparable
from tests.devices import DEVICES, arm_specs_of, device_named, learner_of
from tests.diagnoses import CLASSES, diagnosis_study, make_diagnoses
from tests.examples import examples
from tests.federation.rig import recorded_sessions
from tests.outlines import SIZE, make_outlines, outline_study
from tests.tasks.test_prompted import prompted_study
from torch import Tensor, nn

from wardround.errors import Interrupted, StudyError
from wardround.learning.gradients import autograd
from wardround.plan.arm_specs import ArmSpecs
from wardround.plan.weights import load_model, model_sha256
from wardround.results.schema import Result
from wardround.runs.explain import explain
from wardround.runs.export import export
from wardround.runs.inspection import inspect_model
from wardround.runs.outlook import outlook
from wardround.runs.session import run
from wardround.storage.store import NOTHING
from wardround.study.load import load_study
from wardround.study.schema import Study
from wardround.study.sites import SitesFile, load_sites
from wardround.tasks.build import build_task
from wardround.tasks.classification import ClassificationTask
from wardround.tasks.diagnosed import DiagnosedBatch
from wardround.tasks.distillation import Said, Teacher, binary_distillation, softmax_distillation
from wardround.tasks.labelled import LabelledBatch

EXAMPLES = Path(__file__).parents[2] / "examples"
SITES = {"A": {}, "B": {}}
QUICK: dict[str, Any] = {"schedule": {"rounds": 1}, "local": {"steps": 2, "batch": 4}}
Alter = Callable[..., Study]


def random_logits(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Of a network and its teacher, in double precision."""
    random = torch.Generator().manual_seed(seed)
    made = (4.0 * torch.randn(*shape, dtype=torch.float64, generator=random) for _ in range(2))
    return next(made).requires_grad_(), next(made)


def value(loss: Tensor) -> float:
    return float(loss.detach())


def said(logits: Tensor) -> Said:
    return Said(logits, torch.ones(logits.shape[:2]))


# The loss -------------------------------------------------------------------------------------------------------------


@settings(max_examples=examples(25))
@given(seed=st.integers(0, 2**31), temperature=st.floats(0.5, 20.0), classes=st.integers(2, 7))
def test_the_loss_and_its_gradient_are_those_of_the_paper(seed: int, temperature: float, classes: int) -> None:
    """Hinton et al., 2015: q_i = exp(z_i / T) / sum_j exp(z_j / T), and equation 2 times T^2: T (q_i - p_i)."""
    z, v = random_logits(seed, 3, classes)
    loss = softmax_distillation(z, Said(v, torch.ones(3, classes)), temperature)
    q, p = (torch.exp(x.detach() / temperature) for x in (z, v))
    q, p = q / q.sum(1, keepdim=True), p / p.sum(1, keepdim=True)
    # Of the teacher's logits `float()` keeps 24 bits; their sizes are below 30.
    near: dict[str, Any] = {"rel": 1e-4, "abs": 1e-4 * temperature}
    assert float(loss.detach()) == pytest.approx(temperature**2 * float((p * (p / q).log()).sum(1).mean()), **near)
    (found,) = torch.autograd.grad(loss, z)
    assert torch.allclose(found, temperature * (q - p) / 3, atol=1e-5 * temperature)


@settings(max_examples=examples(25))
@given(seed=st.integers(0, 2**31), temperature=st.floats(0.5, 20.0))
def test_structures_that_may_overlap_are_each_a_divergence_of_two_probabilities(seed: int, temperature: float) -> None:
    z, v = random_logits(seed, 2, 3, 4, 5)
    counts = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    loss = binary_distillation(z, Said(v, counts), temperature)
    q, p = (torch.sigmoid(x.detach() / temperature) for x in (z, v))
    each = (p * (p / q).log() + (1.0 - p) * ((1.0 - p) / (1.0 - q)).log()).mean((2, 3)) * counts
    assert float(loss.detach()) == pytest.approx(
        temperature**2 * float(each.sum()) / 6, rel=1e-4, abs=1e-4 * temperature**2
    )
    (found,) = torch.autograd.grad(loss, z)
    expected = temperature * (q - p) * counts[..., None, None] / (6 * 20)
    assert torch.allclose(found, expected, atol=1e-6 * temperature)


def test_what_says_the_same_as_its_teacher_loses_nothing() -> None:
    logits = torch.randn(4, 3)
    for distance in (softmax_distillation, binary_distillation):
        # The difference of two equal numbers below 30.
        assert float(distance(logits, said(logits), 3.0).abs()) < 9.0 * 30 * 2.0**-23


# What a teacher is ----------------------------------------------------------------------------------------------------


class Fixed:
    """A task with a network that a test gives, which teaches as the task of a study does."""

    def __init__(self, study: Study) -> None:
        self.task: Any = build_task(study)
        torch.manual_seed(3)
        self.teacher = Teacher(self.task, self.task.build_model())

    def teaches(self, study: Study) -> Any:
        student: Any = build_task(study)
        student.learn_from(lambda: self.teacher)
        return student


TEACHER = {"file": "first", "sha256": "0" * 64, "alpha": 0.25, "temperature": 3.0}


def diagnosed(labels: Any, size: int = 16) -> DiagnosedBatch:
    random = torch.Generator().manual_seed(1)
    shown = torch.tensor(labels, dtype=torch.float32)
    return DiagnosedBatch(
        torch.randn(len(shown), 3, size, size, generator=random), shown, torch.full(shown.shape, 1 / 3)
    )


def evaluated(build: Any) -> nn.Module:
    torch.manual_seed(5)
    model: nn.Module = build()
    return model.eval()


@pytest.mark.parametrize("multi_label", [False, True])
def test_an_example_s_part_of_the_loss_is_its_own(multi_label: bool) -> None:
    """With and without a label: what privacy clips of a patient depends on no other."""
    nan = float("nan")
    batch = diagnosed([[1, 0, 0], [nan, nan, nan], [0, 0, 1]])
    settings = {"teacher": TEACHER, "multi_label": multi_label}
    study = diagnosis_study({"A": {}}, task=settings, model={"kind": "vit", "preset": "tiny"})
    student = Fixed(diagnosis_study({"A": {}}, task={"multi_label": multi_label})).teaches(study)
    model = evaluated(student.build_model)
    alone = [DiagnosedBatch(*(t[n : n + 1] for t in vars(batch).values())) for n in range(3)]
    losses = [value(student.loss(model, each)) for each in alone]
    assert value(student.loss(model, batch)) == pytest.approx(np.mean(losses), rel=1e-5)
    gradients = torch.stack([autograd(student, model, each) for each in alone])
    assert torch.allclose(autograd(student, model, batch), gradients.mean(0), atol=1e-5 * float(gradients.abs().max()))
    without: Any = build_task(diagnosis_study({"A": {}}, task={"multi_label": multi_label}))
    # The unlabelled one learns from its teacher alone, the others from both.
    logits = model(batch.images).detach()
    network = student._distillation.teacher.network
    distance = softmax_distillation if not multi_label else binary_distillation
    for n, each in enumerate(alone):
        told = float(distance(logits[n : n + 1], said(network(each.images)), 3.0))
        own = 0.0 if n == 1 else value(without.loss(model, each))
        assert losses[n] == pytest.approx(0.25 * own + 0.75 * told, rel=1e-5)


def test_a_teacher_is_never_moved() -> None:
    """No gradient, no running statistics, and no random number: its network has batch norm and dropout."""
    fixed = Fixed(diagnosis_study({"A": {}}, model={"kind": "efficientnet_lite", "preset": "tiny"}))
    student = fixed.teaches(diagnosis_study({"A": {}}, task={"teacher": TEACHER, "augment": "standard"}))
    network = fixed.teacher.network
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    model, batch = student.build_model(), diagnosed([[1, 0, 0]] * 4)
    model.train()
    state = torch.get_rng_state()
    student.loss(model, batch).backward()
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    assert not network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.grad is not None for p in model.parameters())


def test_classes_and_channels_are_found_by_their_names() -> None:
    fixed = Fixed(diagnosis_study({"A": {}}, task={"size": [24, 32]}))
    turned = {"teacher": TEACHER, "classes": [CLASSES[2], CLASSES[0]]}
    batch = diagnosed([[1, 0], [0, 1]])
    said = fixed.task.lesson_for(diagnosis_study({"A": {}}, task=turned).task).says(
        fixed.teacher.network, batch.images, None
    )
    seen = nn.functional.interpolate(batch.images, (24, 32), mode="bilinear", align_corners=False)
    assert torch.allclose(said.logits, fixed.teacher.network(seen)[:, [2, 0]], atol=1e-5)

    of_one = Fixed(outline_study({"A": {}}, task={"images": ["t1"], "structures": {"core": "any"}}))
    two = {"images": ["flair", "t1"], "channels": 2, "structures": {"edge": [1], "core": [2]}}
    with pytest.raises(StudyError, match=r"does not know edge of task.structures, only core"):
        of_one.task.lesson_for(outline_study({"A": {}}, task=two).task)
    two["structures"] = {"core": [2]}
    images = torch.randn(2, 2, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    found = of_one.task.lesson_for(outline_study({"A": {}}, task=two).task).says(of_one.teacher.network, images, None)
    direct = of_one.teacher.network(images[:, 1:])
    # One window, weighted and divided by its weights.
    assert torch.allclose(found.logits, direct, atol=1e-4 * float(direct.abs().max()))
    assert bool((found.counts == 1.0).all())


def test_a_teacher_of_other_voxels_sees_its_own() -> None:
    fixed = Fixed(outline_study({"A": {}}, task={"resize": [64, 64], "patch": [64, 64]}))
    lesson = fixed.task.lesson_for(outline_study({"A": {}}, task={"resize": [SIZE, SIZE]}).task)
    images = torch.randn(1, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    found = lesson.says(fixed.teacher.network, images, None).logits
    fine = nn.functional.interpolate(images, (64, 64), mode="bilinear", align_corners=False)
    direct = nn.functional.interpolate(fixed.teacher.network(fine), (SIZE, SIZE), mode="area")
    assert found.shape == (1, 1, SIZE, SIZE)
    assert torch.allclose(found, direct, atol=1e-4 * float(direct.abs().max()))


def other_settings() -> list[tuple[Alter, dict[str, Any], Alter, dict[str, Any], str]]:
    """Teacher and student that do not fit each other, and what is said of it."""
    return [
        (diagnosis_study, {}, outline_study, {}, "classification does not teach one of task.kind segmentation"),
        (outline_study, {}, diagnosis_study, {}, "segmentation does not teach one of task.kind classification"),
        (diagnosis_study, {"multi_label": True}, diagnosis_study, {}, "classification does not teach"),
        (diagnosis_study, {"classes": CLASSES[:2]}, diagnosis_study, {}, "it does not know bright of task.classes"),
        (diagnosis_study, {"channels": 1}, diagnosis_study, {}, "it sees 1 channels, of images/{id}, and the study's"),
        (outline_study, {"resize": [SIZE, SIZE]}, outline_study, {}, "one of the two studies has task.resize"),
        (
            outline_study,
            {"dimensions": 3, "patch": [8, 8, 8]},
            outline_study,
            {},
            "it sees 3 dimensions, and task.dimensions is 2",
        ),
        (prompted_study, {}, diagnosis_study, {}, "prompted_segmentation does not teach one of task.kind classif"),
        (prompted_study, {}, outline_study, {"labels": {"share": 0.5}}, "task.labels.share: the study's teacher outl"),
    ]


@pytest.mark.parametrize(("teacher", "theirs", "student", "own", "says"), other_settings())
def test_a_teacher_that_does_not_fit_is_one_clear_error(
    teacher: Alter, theirs: dict[str, Any], student: Alter, own: dict[str, Any], says: str
) -> None:
    task: Any = build_task(teacher({"A": {}}, task=theirs))
    with pytest.raises(StudyError, match=says):
        task.lesson_for(student({"A": {}}, task=own).task)


# A prompted teacher ---------------------------------------------------------------------------------------------------


def test_a_prompted_teacher_outlines_what_the_box_of_a_mask_marks() -> None:
    fixed = Fixed(prompted_study({"A": {}}, task={"images": ["image"]}))
    student = fixed.teaches(outline_study({"A": {}}, task={"teacher": TEACHER, "augment": "none"}))
    masks = torch.zeros(3, 1, SIZE, SIZE)
    masks[0, 0, 4:10, 6:20] = 1.0
    masks[2, 0, 20:24, 3:9] = 1.0
    images = torch.randn(3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    found = fixed.task.lesson_for(outline_study({"A": {}}).task).says(fixed.teacher.network, images, masks)
    assert found.counts.tolist() == [[1.0], [0.0], [1.0]]
    for row, box in ((0, [[12.0, 8.0], [40.0, 20.0]]), (2, [[6.0, 40.0], [18.0, 48.0]])):
        image = images[row : row + 1]
        unit = (image - image.min()) / (image.max() - image.min())
        seen = nn.functional.interpolate(unit, (64, 64), mode="bilinear", align_corners=False)
        large = fixed.teacher.network(seen, torch.tensor([[box]]), (2, 3))
        direct = nn.functional.interpolate(large, (SIZE, SIZE), mode="area")
        assert torch.allclose(found.logits[row], direct[0], atol=1e-4 * float(direct.abs().max()))
    # What has no box is learned from the mask alone, and each example's part is its own.
    model = evaluated(student.build_model)
    batch = LabelledBatch(images, masks, torch.ones(3, 1))
    empty = LabelledBatch(images[1:2], masks[1:2], torch.ones(1, 1))
    plain: Any = build_task(outline_study({"A": {}}))
    assert value(student.loss(model, empty)) == pytest.approx(0.25 * value(plain.loss(model, empty)), rel=1e-5)
    # Of examples that come again the teacher is asked once.
    first, network = student.loss(model, batch), fixed.teacher.network
    network.forward = None  # type: ignore[assignment]
    assert torch.equal(student.loss(model, batch), first)


def test_where_boxes_alone_are_drawn_the_teacher_alone_says_an_outline(tmp_path: Path) -> None:
    """A site that draws no structure (`annotated: []`) and whose masks are boxes: they prompt, and are not learned."""
    sites = make_outlines(tmp_path, {"A": 5})
    fixed = Fixed(prompted_study({"A": {}}, task={"images": ["image"]}))
    student = fixed.teaches(outline_study({"A": {}}, task={"teacher": TEACHER, "annotated": {"A": []}}))
    dataset = student.dataset("A", sites.of("A").data)
    batch = dataset.batch(range(len(dataset)), np.random.default_rng(0))
    assert not batch.known.any()
    said = fixed.task.lesson_for(student.config).says(fixed.teacher.network, batch.images, batch.masks)
    assert 0 < int(said.counts.sum()) == int(batch.masks.amax((1, 2, 3)).sum())
    model = evaluated(student.build_model)
    told = value(binary_distillation(model(batch.images), said, 3.0))
    assert value(student.loss(model, batch)) == pytest.approx(0.75 * told, rel=1e-4)


@pytest.mark.parametrize("dimensions", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_without_a_mask_slices_that_show_something_are_examples(dimensions: int, tmp_path: Path) -> None:
    sites = make_outlines(tmp_path, {"A": 10})
    task = {"dimensions": dimensions, "patch": [SIZE, SIZE, 4][:dimensions], "labels": {"share": 0.4}, "empty_every": 2}
    parts = [
        build_task(outline_study({"A": {}}, task=each)).dataset("A", sites.of("A").data)
        for each in (task, task | {"teacher": TEACHER})
    ]
    few, every = (part.batch(range(len(part)), np.random.default_rng(0)) for part in parts)
    known = every.known[:, 0] > 0.5
    assert int(known.sum()) == len(few)
    # Five patients train, two of them with masks; each slice of the phantoms shows its disc.
    assert int((~known).sum()) == 3 * (2 if dimensions == 2 else 1)
    assert not every.masks[~known].any()
    assert every.masks[known].any()
    # Masks that are withheld are nothing that training sees.
    withheld = set(parts[1].names("train")).difference(parts[0].names("train"))  # type: ignore[attr-defined]
    assert len(withheld) == 3
    for name in withheld:
        path = tmp_path / "A" / name / "mask.nii.gz"
        mask = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(np.full(mask.shape, 7, np.uint8), mask.affine), path)
    again = build_task(outline_study({"A": {}}, task=task | {"teacher": TEACHER})).dataset("A", sites.of("A").data)
    assert again.fingerprint() == parts[1].fingerprint()


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SitesFile, str]:
    """A released classification, in a folder beside its sites' data."""
    root = tmp_path_factory.mktemp("teacher")
    sites = make_diagnoses(root / "data", {"A": (4, 4, 4), "B": (4, 4, 4)})
    result = run(diagnosis_study(SITES, **QUICK), sites, root / "first", engine="local", quiet=True)
    return root, sites, result.model_sha256


def student_study(sha256: str, *, teacher: Any = None, **changes: Any) -> Study:
    """A smaller study of the same pictures that the released model teaches, half of the patients without labels."""
    chosen = {"file": "first", "sha256": sha256, "alpha": 0.5, **(teacher or {})}
    task = {"labels": {"share": 0.5}, "teacher": chosen, **changes.pop("task", {})}
    return diagnosis_study(SITES, task=task, **{"seed": 5, **QUICK, **changes})


def test_who_has_no_label_learns_from_the_teacher_alone(first: tuple[Path, SitesFile, str]) -> None:
    _, sites, sha256 = first
    taught: Any = build_task(student_study(sha256))
    cut: Any = build_task(diagnosis_study(SITES, task={"labels": {"share": 0.5}}))
    every: Any = build_task(diagnosis_study(SITES))
    one, few, all_ = (task.dataset("A", sites.of("A").data) for task in (taught, cut, every))
    assert (one.names("train"), len(one)) == (all_.names("train"), len(all_))
    assert set(few.names("train")) < set(one.names("train"))
    batch = one.batch(range(len(one)), np.random.default_rng(0))
    known = ~batch.labels.isnan().any(dim=1)
    assert int(known.sum()) == len(few)
    labelled = few.batch(range(len(few)), np.random.default_rng(0))
    assert torch.equal(batch.labels[known], labelled.labels)
    # Frequencies are those of labels that are used.
    assert torch.equal(batch.prior[0], labelled.prior[0])
    for split in ("validation", "test"):
        assert one.names(split) == all_.names(split)
        assert not any(each.labels.isnan().any() for _, each in one.evaluation(split))


def test_labels_that_are_withheld_are_not_looked_at(tmp_path: Path) -> None:
    sites = make_diagnoses(tmp_path, {"A": (4, 4, 4)})
    task: Any = build_task(student_study("0" * 64))
    before = task.dataset("A", sites.of("A").data)
    used = build_task(diagnosis_study(SITES, task={"labels": {"share": 0.5}})).dataset("A", sites.of("A").data)
    assert hasattr(used, "names")
    withheld = set(before.names("train")).difference(used.names("train"))
    path = tmp_path / "A" / "labels.csv"
    rows = [line.split(",") for line in path.read_text().splitlines()]
    changed = [[*row[:2], "unheard of"] if row[1] in withheld else row for row in rows]
    assert changed != rows
    path.write_text("\n".join(map(",".join, changed)))
    again = task.dataset("A", sites.of("A").data)
    assert again.fingerprint() == before.fingerprint()
    assert again.names("train") == before.names("train")


@pytest.fixture(scope="module")
def untaught(first: tuple[Path, SitesFile, str]) -> Result:
    """The same study without a teacher."""
    root, sites, _ = first
    alone = diagnosis_study(SITES, task={"labels": {"share": 0.5}}, **QUICK)
    return run(alone, sites, root / "untaught", engine="local", quiet=True)


def test_alpha_1_is_the_study_without_a_teacher_bit_for_bit(
    first: tuple[Path, SitesFile, str], untaught: Result
) -> None:
    """Nothing is asked of it, so it need not be there."""
    root, sites, _ = first
    study = student_study("0" * 64, teacher={"alpha": 1.0, "file": "nowhere"})
    one = run(study, sites, root / "one", engine="local", quiet=True, near=root)
    assert one.model_sha256 == untaught.model_sha256
    assert one.metrics == untaught.metrics


def test_a_teacher_teaches_and_is_in_no_message_and_no_file(
    first: tuple[Path, SitesFile, str], untaught: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, sites, sha256 = first
    sent = recorded_sessions(monkeypatch)
    found = run(student_study(sha256), sites, root / "taught", engine="local", quiet=True, near=root)
    released, plain = (load_file(each.out / "models" / "federated.safetensors") for each in (found, untaught))
    assert released.keys() == plain.keys()
    values = load_file(root / "first" / "models" / "federated.safetensors")
    secret = [value.tobytes() for value in values.values() if value.size > 20]
    assert len(secret) > 5
    assert sent
    assert not any(part in each.data for each in sent for part in secret)
    for path in found.out.rglob("*"):
        assert not (path.is_file() and any(part in path.read_bytes() for part in secret)), path
    says = f"the released model {sha256} (alpha 0.5, temperature 2)"
    assert f"Taught by: {says}" in (found.out / "model_card.md").read_text()
    assert f"taught by {says}" in inspect_model(found.out / "models" / "federated.safetensors")
    assert found.model_sha256 != untaught.model_sha256


def test_another_teacher_is_refused_before_anything_is_written(first: tuple[Path, SitesFile, str]) -> None:
    root, sites, sha256 = first
    for teacher, says in (
        ({"sha256": "ab" * 32}, f"task.teacher.file: first is another file .*: its sha256 is {sha256}, and the study"),
        ({"sha256": ""}, f"task.teacher.sha256: is missing.*write `sha256: {sha256}`"),
        ({"file": "nowhere"}, "task.teacher.file: nowhere does not exist.*`teacher` in a site's entry of the sites"),
        ({"file": "data/A/labels.csv"}, "task.teacher.file: data/A/labels.csv: the model file cannot be read"),
    ):
        with pytest.raises(StudyError, match=says):
            run(student_study(sha256, teacher=teacher), sites, root / "no", engine="local", quiet=True, near=root)
        assert not (root / "no").exists()
    with pytest.raises(StudyError, match=r"first is another file|does not fit this study: it does not know odd"):
        run(
            student_study(sha256, task={"classes": ["odd", *CLASSES]}),
            sites, root / "no", engine="local", quiet=True, near=root,
        )  # fmt: skip
    task: Any = build_task(student_study(sha256))
    model = task.build_model()
    with pytest.raises(StudyError, match="must give it the teacher"):
        task.loss(model, diagnosed([[1, 0, 0]] * 2))
    with pytest.raises(ValueError, match=r"task.imbalance: balanced draws examples by their labels"):
        student_study(sha256, task={"imbalance": "balanced"})


def test_a_teacher_of_which_a_part_stays_at_its_sites_is_refused(
    first: tuple[Path, SitesFile, str], tmp_path: Path
) -> None:
    """Its hash covers what is shared: another value of the rest would teach under the same name."""
    tensors, metadata = load_model(first[0] / "first" / "models" / "federated.safetensors")
    names = metadata["shared"].split()
    metadata["shared"] = " ".join(names[1:])
    save_file(tensors, tmp_path / "part.safetensors", metadata)
    study = student_study(model_sha256(tensors, metadata), teacher={"file": "part.safetensors"})
    with pytest.raises(StudyError, match=rf"keeps a part at each of its sites \({names[0]}\), which its hash does not"):
        ArmSpecs(study, (), places=study.places(tmp_path)).check_teacher()


def test_a_site_finds_its_own_copy(first: tuple[Path, SitesFile, str], tmp_path: Path) -> None:
    root, _, sha256 = first
    path = tmp_path / "sites.yaml"
    path.write_text("".join(["sites:\n", *(f"  {n}: {{data: {root}/data/{n}, teacher: ../copy}}\n" for n in SITES)]))
    (tmp_path.parent / "copy").symlink_to(root / "first")
    study = tmp_path / "study.yaml"
    study.write_text(student_study(sha256).model_dump_json(exclude_unset=True))
    try:
        places = load_study(study).places(tmp_path, [*load_sites(path).sites.values()])
        assert places.teacher == ((tmp_path.parent / "copy").resolve(),)
        plans = ArmSpecs(load_study(study), (), places=places)
        plans.check_teacher()
        assert plans.teacher is plans.teacher
        text = explain(study, path, (), ())
        assert f"taught by the released model {sha256}" in " ".join(text.split())
    finally:
        (tmp_path.parent / "copy").unlink()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["classification", pytest.param("prompted", marks=pytest.mark.slow)])
def test_a_lesson_on_any_device(kind: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = device_named(device, monkeypatch)
    if kind == "classification":
        make_diagnoses(tmp_path, {"A": (4, 4, 4)})
        teacher, study = diagnosis_study({"A": {}}), student_study("0" * 64)
    else:
        make_outlines(tmp_path, {"A": 6})
        teacher = prompted_study({"A": {}})
        study = outline_study({"A": {}}, task={"teacher": TEACHER}, **QUICK)
    plans = arm_specs_of(study)
    plans.__dict__["teacher"] = Fixed(teacher).teacher
    learner = learner_of(plans, tmp_path / "A", compute)
    public, _ = plans.initial(plans.arm_spec("federated"))
    learner.load(public, NOTHING)
    assert learner.train(1, public, NOTHING).changes
    assert set(learner.held_out.evaluate("validation")) == {spec.name for spec in plans.task.metrics}


@pytest.mark.slow
@pytest.mark.parametrize("augment", ["none", "standard"])
def test_engines_parties_and_stops_give_the_same_bits(
    augment: str, first: tuple[Path, SitesFile, str], tmp_path: Path
) -> None:
    root, sites, sha256 = first
    changes = {"task": {"augment": augment}, "schedule": {"rounds": 3}}
    study = student_study(sha256, **changes)
    whole = run(study, sites, tmp_path / "whole", engine="local", quiet=True, near=root)
    workers = run(study, sites, tmp_path / "workers", engine="workers", processes=2, quiet=True, near=root)
    assert comparable(workers.values) == comparable(whole.values)

    class Stops:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: None

        def round(self, report: Any) -> None:
            if report.round == 2:
                raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run(study, sites, tmp_path / "out", engine="local", watcher=Stops(), near=root)  # type: ignore[arg-type]
    again = run(study, sites, tmp_path / "out", engine="local", near=root, quiet=True, resume=True)
    assert comparable(again.values) == comparable(whole.values)

    own = SitesFile(sites={n: e.model_copy(update={"teacher": root / "first"}) for n, e in sites.sites.items()})
    parted = apart(study, own, tmp_path / "apart")
    assert parted.model_sha256 == whole.model_sha256


@pytest.mark.slow
def test_privacy_counts_what_a_teacher_says_of_a_patient(first: tuple[Path, SitesFile, str]) -> None:
    root, sites, sha256 = first
    changes = {
        "protection": {"privacy": {"patients_per_step": 2, "gradients": "exact"}},
        "model": {"kind": "vit", "preset": "tiny"},
        "method": {"kind": "fedavg", "weights": "equal"},
        "schedule": {"rounds": 2, "release": "last", "validate_every": 0},
    }
    study = student_study(sha256, **changes)
    result = run(study, sites, root / "private", engine="local", quiet=True, near=root)
    assert result.privacy is not None
    assert all(site.steps == 4 for site in result.privacy.sites.values())


@pytest.mark.slow
def test_a_plan_counts_the_teacher(first: tuple[Path, SitesFile, str]) -> None:
    root, _, sha256 = first
    (root / "study.yaml").write_text(student_study(sha256).model_dump_json(exclude_unset=True))
    (root / "sites.yaml").write_text("".join(["sites:\n", *(f"  {n}: {{data: data/{n}}}\n" for n in SITES)]))
    planned = outlook(root / "study.yaml", root / "sites.yaml", (), (), ())
    assert "In all there is a teacher, too" in planned.text
    taken, _ = planned.memory["A"]
    released = load_file(root / "first" / "models" / "federated.safetensors")
    assert taken.teacher == sum(value.nbytes for value in released.values())
    assert taken.step is not None
    assert taken.total == taken.model + taken.copies + taken.teacher + taken.step


@pytest.mark.slow
@pytest.mark.parametrize("prompted", [False, True])
def test_a_large_network_teaches_a_small_one_that_is_exported(prompted: bool, tmp_path: Path) -> None:
    """The whole way: a released segmentation teaches another, half of the patients without masks; then ONNX."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    sites = make_outlines(tmp_path / "data", {"A": 8, "B": 8})
    lora = {"kind": "lora", "targets": ["mask_decoder.transformer.*.q_proj"], "rank": 2}
    adapted = prompted_study(SITES, adapters=lora, parts={"frozen": []})
    large = adapted if prompted else outline_study(SITES, model={"kind": "segresnet", "preset": "tiny"})
    teacher = run(large, sites, tmp_path / "large", engine="local", quiet=True)
    chosen = {"file": "large", "sha256": teacher.model_sha256, "alpha": 0.3}
    task = {"teacher": chosen, "labels": {"share": 1.0 if prompted else 0.4}}
    small = run(outline_study(SITES, task=task), sites, tmp_path / "small", engine="local", quiet=True, near=tmp_path)
    done = export(small.out / "models" / "federated.safetensors", tmp_path / "small.onnx")
    session = onnxruntime.InferenceSession(done.output, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": np.zeros((1, 1, SIZE, SIZE), np.float32)})
    assert logits.shape == (1, 1, SIZE, SIZE)
    assert small.metric("federated", "mean", "dice") > 0.3


def test_the_examples_fit_their_teachers() -> None:
    """Who tests the small network taught nothing to the large one, and each knows what the other is asked."""
    for large, small in (("skin", "skin-small"), ("lgg-medsam", "lgg-small")):
        before, after = (load_study(EXAMPLES / f"{name}.yaml") for name in (large, small))
        assert (before.seed, before.sites) == (after.seed, after.sites)
        assert before.task.split == after.task.split  # type: ignore[attr-defined]
        task: Any = build_task(before)
        assert task.lesson_for(after.task) is not None
        assert after.task.taught_by is not None
        if isinstance(after.task, ClassificationTask):
            assert after.task.labels.share == 0.05
