"""What sites say of their images before training: sums that add up, and that no two answers of which give a patient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

from tests.outlines import make_outlines, outline_study
from wardround.errors import DataError, StudyError, WireError
from wardround.federation.exchange import ERROR
from wardround.federation.facts import PLAN
from wardround.federation.statistics import (
    OTHER,
    STATISTICS,
    SiteStatistics,
    Sums,
    added,
    check_statistics,
)
from wardround.results.shift import SHIFT_FILE, Shift
from wardround.runs.across import inspect_across
from wardround.runs.explain_shift import statistics_words
from wardround.runs.machine import Machine
from wardround.runs.session import run
from wardround.runs.shift import ask_shift, profile_of, shared_landmarks, shift_of, spread_of
from wardround.site.egress import EgressRules
from wardround.site.measured import SETS, MeasuredSets
from wardround.site.statistics import OwnStatistics, kinds_of, summed, well_reached
from wardround.study.sites import Egress, SitesFile
from wardround.tasks.looks import BINS, Look, Quantity, Subject
from wardround.wire.message import Header, Message

# Whole runs: `make test-all` has them.
pytestmark = pytest.mark.slow

LEAST = 5
SUBJECT = Subject(1, ("tumour",), ("a", "b", "c"))


def look(seed: int, drawn: bool, shown: int) -> Look:
    values = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    mask = np.zeros((8, 8), bool)
    mask[:2, :2] = drawn
    classes = np.arange(3) == shown
    return Look(
        [values.numpy().ravel()], values, torch.ones(1, 1, 8, 8, dtype=torch.bool), (8, 8), None, (mask,), classes
    )


class Patients:
    """A data set of these patients, by number: who is `without` has no tumour, and class 0, 1 or 2 as `classes` say."""

    def __init__(
        self, numbers: Sequence[int], without: Sequence[int] = (), classes: dict[int, int] | None = None
    ) -> None:
        self.numbers, self.without, self.classes = list(numbers), set(without), classes or {}

    def patients(self, split: str) -> int:
        return len(self.numbers) if split == "train" else 0

    def names(self, split: str) -> tuple[str, ...]:
        return tuple(f"Doe-{number}" for number in self.numbers)

    def fingerprint(self) -> str:
        return "print"

    def looks(self, split: str) -> Any:
        yield from ((n, look(n, n not in self.without, self.classes.get(n, n % 2))) for n in self.numbers)

    def of(self, subject: Subject) -> Any:
        """The same with what a study of the subject looks at."""
        changed: dict[str, Any] = {} if subject.structures else {"structures": ()}
        changed |= {} if subject.classes else {"classes": None}
        return SimpleNamespace(
            patients=self.patients,
            names=self.names,
            fingerprint=self.fingerprint,
            looks=lambda split: ((n, replace(one, **changed)) for n, one in self.looks(split)),
        )


class Clinic:
    """A site across hospitals that is asked again and again."""

    def __init__(self, folder: Path, **rules: Any) -> None:
        self.sets = MeasuredSets(folder / "history")
        self.rules = EgressRules(**{"floor": LEAST, **rules})

    def asked(self, patients: Patients, subject: Subject = SUBJECT, private: bool = False) -> SiteStatistics:
        dataset = patients.of(subject)
        return OwnStatistics("A", self.rules, self.sets, private).answer(SimpleNamespace(), subject, dataset)


# Sums -----------------------------------------------------------------------------------------------------------------


def test_answers_of_sites_add_up_to_that_of_all_patients(tmp_path: Path) -> None:
    one, other = Patients(range(9)), Patients(range(20, 32))
    said = {name: Clinic(tmp_path / name, floor=1).asked(each) for name, each in (("A", one), ("B", other))}
    together = Clinic(tmp_path / "both", floor=1).asked(Patients([*one.numbers, *other.numbers]))
    assert together.patients == 21
    for name in together.quantities:
        assert added(said, name) == together.quantities[name]
    assert {name: said["A"].classes[name] + said["B"].classes[name] for name in "abc"} == together.classes


def test_mean_and_deviation_follow_from_sums() -> None:
    quantity = Quantity(1, 0.5, squares=True)
    sums = summed(np.array([[1.0], [2.0], [4.5]]), quantity)
    assert sums == Sums(n=3, total=(15,), squares=(4 + 16 + 81,))
    (found,) = spread_of(sums, quantity)
    assert found.mean == 2.5
    assert found.std == pytest.approx(np.std([1.0, 2.0, 4.5], ddof=1), abs=1e-6)


def test_a_profile_is_what_the_images_are(tmp_path: Path) -> None:
    patients = Patients(range(40), without=range(10))
    found = profile_of(Clinic(tmp_path, floor=1).asked(patients), SUBJECT)
    values = np.concatenate([each.values[0] for _, each in patients.looks("train")])
    (channel,) = found.channels
    assert channel.mean == pytest.approx(values.mean(), abs=0.01)
    assert channel.std == pytest.approx(values.std(), abs=0.01)
    # A percentile lies in the bin of the value, of width 0.1.
    for name in ("p5", "p50", "p95"):
        assert channel.percentiles[name] == pytest.approx(np.percentile(values, float(name[1:])), abs=0.1)
    assert found.structures["tumour"].share is not None
    assert found.structures["tumour"].share.mean == pytest.approx(0.75 * 4 / 64, abs=1e-6)
    assert found.structures["tumour"].volume_ml is None
    assert found.matrix[0].mean == 8.0
    assert found.spacing == ()
    assert found.split == "train"


# What stays -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "private", "said"),
    [
        ({"per_site_results": False}, False, "egress.per_site_results is false"),
        ({}, True, "no noise"),
        ({"minimum_cohort": 13}, False, "fewer than 13 patients"),
    ],
)
def test_nothing_leaves_against_the_site_s_rules(
    tmp_path: Path, rules: dict[str, Any], private: bool, said: str
) -> None:
    found = Clinic(tmp_path, **rules).asked(Patients(range(12)), private=private)
    assert said in found.withheld["all"]
    assert found.model_copy(update={"withheld": {}}) == SiteStatistics()
    assert not (tmp_path / "history" / SETS).exists()


def test_a_site_lets_out_the_kinds_that_its_file_lists(tmp_path: Path) -> None:
    found = Clinic(tmp_path, metrics=frozenset({"spectrum", "noise"})).asked(Patients(range(12)))
    assert found.quantities.keys() == {"spectrum", "noise"}
    assert found.withheld["share of tumour"] == "masks not in egress.metrics"
    assert found.withheld["classes"] == "classes not in egress.metrics"
    assert list(kinds_of(SUBJECT)) == [
        "intensity",
        "landmarks",
        "spectrum",
        "noise",
        "matrix",
        "spacing",
        "masks",
        "classes",
    ]
    kept = Clinic(tmp_path / "other", scanner_facts=False).asked(Patients(range(12)))
    assert kept.withheld["matrix"] == "egress.scanner_facts is false"
    assert "matrix" not in kept.quantities


def test_one_more_patient_gets_no_second_answer(tmp_path: Path) -> None:
    clinic = Clinic(tmp_path)
    first = clinic.asked(Patients(range(12)))
    assert first.quantities
    assert clinic.asked(Patients(range(12))) == first
    for joined in (range(13), range(1, 12), range(1, 13)):
        again = clinic.asked(Patients(joined))
        assert "differ from those it measured before by fewer than 5" in again.withheld["all"]
        assert not again.quantities
    assert clinic.asked(Patients(range(17))).quantities


def test_a_structure_that_few_have_stays_and_so_does_one_that_few_lack(tmp_path: Path) -> None:
    for number, without in enumerate((range(9), range(3), range(12))):
        found = Clinic(tmp_path / str(number)).asked(Patients(range(12), without=without))
        kept = {name for name in found.withheld if "tumour" in name}
        assert kept == (set() if len(without) == 12 else {"share of tumour", "slices with tumour"})
        assert found.quantities.keys() >= {"intensity", "noise"}
    half = Clinic(tmp_path / "half").asked(Patients(range(12), without=range(6)))
    assert {name for name in half.quantities if "tumour" in name} == {"share of tumour", "slices with tumour"}


def test_a_second_study_cannot_part_the_patients_further(tmp_path: Path) -> None:
    """Six of twelve have the first structure, and six the second: three have both."""
    clinic, patients = Clinic(tmp_path), range(12)
    one = Subject(1, ("tumour",))
    assert "share of tumour" in clinic.asked(Patients(patients, without=range(6)), one).quantities
    crossed = clinic.asked(Patients(patients, without=range(3, 9)), one)
    assert "with groups that it gave before" in crossed.withheld["share of tumour"]
    assert "intensity" in crossed.quantities


def test_small_classes_are_counted_together(tmp_path: Path) -> None:
    classes = {number: 0 if number < 9 else 1 if number < 15 else 2 for number in range(18)}
    found = Clinic(tmp_path).asked(Patients(range(18), classes=classes))
    # Three of class c alone, and so with the next smallest.
    assert found.classes == {"a": 9, OTHER: 9}
    every = Clinic(tmp_path / "open", floor=1).asked(Patients(range(18), classes=classes))
    assert every.classes == {"a": 9, "b": 6, "c": 3}
    alone = Clinic(tmp_path / "alone").asked(Patients(range(18), classes=dict.fromkeys(range(18), 1)))
    assert alone.withheld["classes"] == "it would say of every patient which class they have"


def test_classes_that_overlap_are_parted_each(tmp_path: Path) -> None:
    several = Subject(1, (), ("a", "b", "c"), several=True)
    found = Clinic(tmp_path).asked(Patients(range(12)), several)
    assert found.classes == {"a": 6, "b": 6, "c": 0}
    few = Clinic(tmp_path / "few").asked(Patients(range(12), classes={0: 2}), several)
    assert few.classes == {}
    assert "fewer than 5" in few.withheld["classes"]


def test_a_bin_that_few_patients_reach_is_left_out_of_every_histogram() -> None:
    shares = np.zeros((6, 4))
    shares[:, 1] = 0.6
    shares[:5, 2] = 0.4
    shares[5, 0] = 0.4
    found = well_reached(shares, 5)
    assert np.allclose(found, [[0.0, 0.6, 0.4, 0.0]] * 5 + [[0.0, 1.0, 0.0, 0.0]])
    # Where one patient is enough nothing is changed, to the last step of a sum.
    assert np.allclose(well_reached(shares, 1), shares, rtol=1e-12)
    assert not well_reached(np.eye(3), 2).any()


# Messages -------------------------------------------------------------------------------------------------------------


def test_what_is_not_of_the_study_is_refused(tmp_path: Path) -> None:
    said = Clinic(tmp_path, floor=1).asked(Patients(range(6)))
    assert check_statistics(said, SUBJECT) == said
    noise = said.quantities["noise"]
    for changed in (
        {"quantities": {"name": noise}},
        {"quantities": {"noise": Sums(n=6, total=(1, 2), squares=(1, 2))}},
        {"quantities": {"noise": Sums(n=6, total=(1,))}},
        {"quantities": {"noise": Sums(n=7, total=(1,), squares=(1,))}},
        {"classes": {"d": 3}},
    ):
        with pytest.raises(WireError):
            check_statistics(said.model_copy(update=changed), SUBJECT)


def ask(host: Machine, site: str, **meta: Any) -> Message:
    header = Header(STATISTICS, host.study_sha256, site, meta={PLAN: host.plan_sha256, **meta})
    return host.find(header).handle(Message(header))


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> SitesFile:
    return make_outlines(tmp_path_factory.mktemp("hospitals"), {"A": 5, "B": 6})


def test_a_site_answers_only_a_study_that_asks(hospitals: SitesFile, tmp_path: Path) -> None:
    plain = Machine(outline_study({"A": {}, "B": {}}), hospitals, tmp_path / "plain", ())
    assert "asks for no statistics" in str(ask(plain, "A").header.meta["reason"])
    plain.close()
    asking = Machine(outline_study({"A": {}, "B": {}}, site_statistics=True), hospitals, tmp_path / "asking", ())
    reply = ask(asking, "A").header
    assert reply.kind == STATISTICS
    assert SiteStatistics.model_validate(dict(reply.meta)).patients == 2
    assert ask(asking, "A", plus=1).header.kind == ERROR
    asking.close()


def test_privacy_and_statistics_exclude_each_other() -> None:
    private = {"privacy": {"preset": "moderate"}}
    with pytest.raises(ValidationError, match="site_statistics: with protection"):
        outline_study({"A": {}}, site_statistics=True, protection=private)


def test_a_federation_asks_before_its_first_round_and_goes_on_with_the_answer(
    hospitals: SitesFile, tmp_path: Path
) -> None:
    study = outline_study(
        {"A": {}, "B": {}}, site_statistics=True, schedule={"rounds": 1, "validate_every": 0, "release": "last"}
    )
    run(study, hospitals, tmp_path / "out", engine="local", quiet=True)
    text = (tmp_path / "out" / SHIFT_FILE).read_text(encoding="utf-8")
    shift = Shift.model_validate_json(text)
    assert shift.sites.keys() == {"A", "B"}
    assert shift.distances["intensity"]["A"]["B"] == shift.distances["intensity"]["B"]["A"] > 0.0
    assert "DOE" not in text
    assert (tmp_path / "out" / "shift.html").exists()
    # The same answer as on one machine before any run.
    alone = inspect_across(hospitals, outline_study({"A": {}, "B": {}}))
    assert alone.model_dump() == shift.model_dump()


def test_a_site_that_is_not_there_is_said_so(hospitals: SitesFile, tmp_path: Path) -> None:
    class Silent:
        def exchange(self, messages: Any) -> Any:
            yield from (m.reply("error", meta={"reason": "away"}) for m in messages)

    host = Machine(outline_study({"A": {}, "B": {}}, site_statistics=True), hospitals, tmp_path, ())
    found = ask_shift(host, Silent())  # type: ignore[arg-type]
    assert found.failed == {"A": "away", "B": "away"}
    assert found.landmarks is None
    assert shift_of(host, {}, {}).sites == {}
    host.close()


def test_check_and_a_review_say_what_leaves(hospitals: SitesFile, tmp_path: Path) -> None:
    plain = Machine(outline_study({"A": {}, "B": {}}), hospitals, tmp_path, ())
    assert statistics_words(plain) is None
    rules = Egress(metrics=("spectrum", "matrix"), scanner_facts=False, minimum_cohort=7)
    closed = Egress(per_site_results=False)
    entries = {
        name: hospitals.sites[name].model_copy(update={"egress": each}) for name, each in (("A", rules), ("B", closed))
    }
    study = outline_study({"A": {}, "B": {}, "C": {}}, site_statistics=True, protection={"secure": True})
    host = Machine(study, SitesFile(sites={**entries, "C": entries["A"]}), tmp_path, ())
    everything = statistics_words(host)
    assert everything is not None
    assert "histograms" in everything
    assert "not masked" in everything
    own = statistics_words(host, "A")
    assert own is not None
    assert "of spectra; of no part of the patients below 7" in own
    assert statistics_words(host, "B") == "no statistics of images: egress.per_site_results is false"


# On one machine -------------------------------------------------------------------------------------------------------


def test_landmarks_are_the_mean_over_all_training_patients_and_go_into_a_study(
    hospitals: SitesFile, tmp_path: Path
) -> None:
    file = tmp_path / "landmarks.yaml"
    shift = inspect_across(hospitals, outline_study({"A": {}, "B": {}}), tmp_path / "out", landmarks=file)
    assert shift.landmarks is not None
    section = yaml.safe_load(file.read_text(encoding="utf-8"))["task"]["normalise"]
    study = outline_study({"A": {}, "B": {}}, task={"normalise": section})
    assert study.task.normalise.values == shift.landmarks.values  # type: ignore[attr-defined]
    assert shift.landmarks.values[0][0] == -2.0
    assert shift.landmarks.values[0][-1] == 2.0
    # With them the sites' histograms have the same landmarks.
    after = inspect_across(hospitals, study)
    assert after.distances["intensity"]["A"]["B"] < shift.distances["intensity"]["A"]["B"]
    with pytest.raises(StudyError, match="has landmarks already"):
        inspect_across(hospitals, study, landmarks=file)


@pytest.mark.slow
def test_a_site_that_keeps_its_landmarks_lets_none_be_written(hospitals: SitesFile, tmp_path: Path) -> None:
    rules = Egress(metrics=("intensity",))
    entries = {**hospitals.sites, "B": hospitals.sites["B"].model_copy(update={"egress": rules})}
    with pytest.raises(DataError, match=r"B gave no sums of landmarks \(landmarks not in egress.metrics"):
        inspect_across(SitesFile(sites=entries), outline_study({"A": {}, "B": {}}), landmarks=tmp_path / "l.yaml")


def test_repeated_asks_on_one_machine_are_on_record_in_the_folder(hospitals: SitesFile, tmp_path: Path) -> None:
    rules = Egress(minimum_cohort=2)
    entries = {name: entry.model_copy(update={"egress": rules}) for name, entry in hospitals.sites.items()}
    sites, out = SitesFile(sites=entries), tmp_path / "out"
    assert not inspect_across(sites, outline_study({"A": {}, "B": {}}), out).sites["A"].withheld.get("all")
    changed = {"split": {"validation": 0.0, "test": 0.5}}
    found = inspect_across(sites, outline_study({"A": {}, "B": {}}, task=changed), out)
    assert any("differ from those" in site.withheld.get("all", "") for site in found.sites.values())


def test_without_a_study_outlines_that_all_patients_have_are_enough(hospitals: SitesFile, tmp_path: Path) -> None:
    found = inspect_across(hospitals)
    assert found.images == ("image",)
    assert {site: profile.patients for site, profile in found.sites.items()} == {"A": 5, "B": 6}
    assert found.sites["A"].structures["mask"].volume_ml is not None
    bare = tmp_path / "bare" / "X" / "P"
    bare.mkdir(parents=True)
    (bare / "other.nii.gz").write_bytes(b"")
    with pytest.raises(StudyError, match="name a study"):
        inspect_across(SitesFile.model_validate({"sites": {"X": {"data": str(bare.parent)}}}))


def test_landmarks_of_sites_that_do_not_train_do_not_count(tmp_path: Path) -> None:
    said = {
        name: Clinic(tmp_path / name, floor=1).asked(Patients(range(at, at + 6))) for name, at in (("A", 0), ("U", 9))
    }
    found = shared_landmarks(said, ("A",), SUBJECT)
    assert found is not None
    assert found.sites == ("A",)
    assert found.patients == 6
    assert BINS * SUBJECT.channels == len(said["A"].quantities["intensity"].total)
