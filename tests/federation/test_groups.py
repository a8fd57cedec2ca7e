"""Results by a column that a site declares: right where they leave, and nothing of a handful by any sum of them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.apart import apart
from tests.cohorts import cohort_study
from tests.federation.rig import recorded_sessions
from tests.federation.test_own_results import ruled, table_of
from wardround.errors import DataError
from wardround.federation.grouped import GROUPS, SiteGroups
from wardround.runs.explain_groups import group_lines
from wardround.runs.machine import NOWHERE, Machine
from wardround.runs.session import Result, evaluate, run
from wardround.site.egress import EgressRules
from wardround.site.groups import OwnGroups, labels_of, parted
from wardround.site.measured import SETS, MeasuredSets
from wardround.site.patients import OwnResults, PatientRows, results_of
from wardround.study.groups import OTHER, Column, Groups
from wardround.study.sites import Egress, SitesFile
from wardround.tasks.task import MetricSpec

LEAST = 5
DICE = MetricSpec("dice", 0.0, 1.0, 1e-6, True, may_be_absent=True)
ERROR = MetricSpec("error", 0.0, 1.0, 1e-6, False)
SPECS = (DICE, ERROR)
SEX, AGE = Column(values={"female": ("F",), "male": ("M",)}), Column(bands=(40, 60))


# A clinic's table -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Person:
    """What a site's table says of a patient, and what one model gives of them: a Dice where there is a tumour."""

    name: str
    sex: str
    age: int
    values: Mapping[str, float]


def people(count: int, seed: int) -> list[Person]:
    drawn = np.random.default_rng(seed)
    return [
        Person(
            f"Doe-{number}",
            str(drawn.choice(["F", "M", "X", ""], p=[0.45, 0.45, 0.05, 0.05])),
            int(drawn.integers(20, 80)),
            {"dice": float(drawn.random()) if drawn.random() < 0.7 else np.nan, "error": float(drawn.random())},
        )
        for number in range(count)
    ]


def write_table(path: Path, rows: Iterable[Person]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("patient", "sex", "age"), *((p.name, p.sex, p.age) for p in rows)])
    return path


class Clinic:
    """A site across hospitals: what it gives in one run after the other, and what an attacker can write down of it."""

    def __init__(self, folder: Path, everybody: Sequence[Person], least: int = LEAST) -> None:
        self.everybody, self.least = {p.name: p for p in everybody}, least
        self.sets = MeasuredSets(folder / "history")
        self.file = write_table(folder / "clinic.csv", everybody)
        # Metric -> equations: who is in a sum, and the sum.
        self.told: dict[str, list[tuple[frozenset[str], float]]] = {spec.name: [] for spec in SPECS}

    def run(self, tested: Sequence[str], columns: Mapping[str, Column]) -> SiteGroups:
        """A run in which these patients test, and all that leaves."""
        egress = EgressRules(floor=self.least)
        dataset = SimpleNamespace(names=lambda split: tuple(tested), fingerprint=lambda: "print")
        learner: Any = SimpleNamespace(task=SimpleNamespace(metrics=SPECS), dataset=dataset)
        values = {s.name: np.array([self.everybody[name].values[s.name] for name in tested]) for s in SPECS}
        own = OwnResults("A", "federated", frozenset(), egress, PatientRows(), self.sets, lambda *_: None)
        if own.withheld("test", values, learner) is not None:
            return SiteGroups()
        stays = own.kept_back("test", 1, values, learner, hidden=True)
        for name, found in results_of("A", SPECS, values, None, least=self.least, root=bytes(32)).items():
            if name not in stays and found.mean.count:
                self._tell(name, tested, found.mean.count, found.mean.value)
        groups = OwnGroups("A", SPECS, egress, self.sets, bytes(32))
        said = groups.answer(Groups(file=self.file, columns=columns), dataset, {"federated": values})  # type: ignore[arg-type]
        for column in said.columns:
            known = {group.name for group in column.groups}
            for group in column.groups:
                labels = {name: self._label(columns[column.name], column.name, name) for name in tested}
                members = [n for n, label in labels.items() if (label if label in known else OTHER) == group.name]
                for name, told in group.rows["federated"].items():
                    self._tell(name, members, told.n, told.value)
        return said

    def _label(self, column: Column, name: str, who: str) -> str:
        return column.label(str(getattr(self.everybody[who], name)))

    def _tell(self, metric: str, members: Sequence[str], count: int, mean: float) -> None:
        """The attacker knows everything of the patients but their values: who was tested, who is what, who has one."""
        having = frozenset(n for n in members if not np.isnan(self.everybody[n].values[metric]))
        assert len(having) == count
        self.told[metric].append((having, count * mean))

    def solved(self, most: int = LEAST - 1) -> list[tuple[str, int]]:
        """By metric, in how many ways some weighted sum of all equations is of at most so many patients."""
        found = []
        for metric, equations in self.told.items():
            names = sorted({name for members, _ in equations for name in members})
            rows = np.array([[name in members for name in names] for members, _ in equations], dtype=float)
            # Patients who are in the same sums cannot be told apart, so they are one.
            kinds, sizes = np.unique(rows.T, axis=0, return_counts=True)
            rank = np.linalg.matrix_rank(kinds)
            chosen = [c for n in range(1, most + 1) for c in combinations(range(len(kinds)), n)]
            few = [c for c in chosen if sizes[list(c)].sum() <= most]
            without = np.repeat(kinds[None], len(few), axis=0)
            for place, one in enumerate(few):
                without[place, list(one)] = 0.0
            # A sum of these alone vanishes on all others: without them there is one equation less.
            solved = int((np.linalg.matrix_rank(without) < rank).sum()) if few else 0
            found += [(metric, solved)] if solved else []
        return found


def names_of(numbers: Iterable[int]) -> list[str]:
    return [f"Doe-{number}" for number in numbers]


# The attacker ---------------------------------------------------------------------------------------------------------


def several_runs(clinic: Clinic, seed: int) -> list[SiteGroups]:
    """What a site may come to do over the years: patients join and leave, bands move, columns come and go."""
    drawn = np.random.default_rng(seed)
    tested = list(range(40))
    said = []
    for _ in range(3):
        bands = sorted(drawn.choice(np.arange(30, 70), 2, replace=False).tolist())
        age = AGE if drawn.random() < 0.5 else Column(bands=tuple(bands))
        columns = {"sex": SEX, "age": age} if drawn.random() < 0.5 else {"age": age, "sex": SEX}
        said.append(clinic.run(names_of(tested), columns if drawn.random() < 0.7 else dict([columns.popitem()])))
        joining = drawn.choice([0, 1, 5, 6, 12])
        tested = [*tested[drawn.choice([0, 0, 1, 6]) :], *range(max(tested) + 1, max(tested) + 1 + joining)]
    return said


@pytest.mark.parametrize("seed", range(12))
def test_no_value_of_few_patients_can_be_solved_for(tmp_path: Path, seed: int) -> None:
    clinic = Clinic(tmp_path, people(90, seed))
    said = several_runs(clinic, seed)
    assert said[0].columns
    assert any(column.groups for one in said for column in one.columns)
    assert clinic.solved() == []


@pytest.mark.parametrize("seed", range(4))
def test_the_attacker_finds_them_where_single_patients_may_leave(tmp_path: Path, seed: int) -> None:
    single = Clinic(tmp_path, people(90, seed), least=1)
    several_runs(single, seed)
    assert single.solved(most=1)


def given(said: SiteGroups) -> dict[str, list[str]]:
    """The groups of each column that leaves."""
    return {c.name: [group.name for group in c.groups] for c in said.columns if c.groups}


def reasons(said: SiteGroups) -> dict[str, str]:
    return {column.name: column.reason for column in said.columns if column.reason}


def persons(*kinds: tuple[int, str, int], dice: float = 0.5) -> list[Person]:
    """So many of each kind, of a sex and an age."""
    found: list[Person] = []
    for count, sex, age in kinds:
        for _ in range(count):
            number = len(found)
            values = {"dice": dice, "error": 0.01 * number}
            found.append(Person(f"Doe-{number}", sex, age, values))
    return found


def test_a_column_that_crosses_another_in_one_patient_stays(tmp_path: Path) -> None:
    """One old woman, many young men: women less the young is her value less theirs, which bounds it."""
    rows = persons((6, "F", 30), (1, "F", 70), (20, "M", 30), (9, "M", 70))
    old = Column(bands=(50,))
    said = Clinic(tmp_path, rows).run([p.name for p in rows], {"sex": SEX, "age": old})
    assert given(said) == {"sex": ["female", "male"]}
    assert "into sets of fewer than 5" in reasons(said)["age"]
    (tmp_path / "b").mkdir()
    more = persons((6, "F", 30), (5, "F", 70), (20, "M", 30), (9, "M", 70))
    both = Clinic(tmp_path / "b", more).run([p.name for p in more], {"sex": SEX, "age": old})
    assert given(both) == {"sex": ["female", "male"], "age": ["below 50", "50 or more"]}


def test_a_second_run_with_bands_moved_by_a_patient_gives_nothing(tmp_path: Path) -> None:
    rows = persons((8, "F", 30), (1, "F", 50), (9, "F", 70))
    clinic, tested = Clinic(tmp_path, rows), [p.name for p in rows]
    assert given(clinic.run(tested, {"age": Column(bands=(50,))}))
    moved = clinic.run(tested, {"age": Column(bands=(51,))})
    assert "into sets of fewer than 5" in reasons(moved)["age"]
    assert given(clinic.run(tested, {"age": Column(bands=(45,))}))  # the same groups, by other words
    assert clinic.solved() == []


def test_groups_that_grow_by_fewer_than_the_cohort_are_not_given_again(tmp_path: Path) -> None:
    rows = persons((9, "F", 30), (9, "M", 30), (3, "F", 30), (3, "M", 30), (4, "F", 30), (4, "M", 30))
    clinic, names = Clinic(tmp_path, rows), [p.name for p in rows]
    assert given(clinic.run(names[:18], {"sex": SEX}))
    second = clinic.run(names[:24], {"sex": SEX})  # six join: three women, three men
    assert "into sets of fewer than 5" in reasons(second)["sex"]
    assert given(clinic.run(names, {"sex": SEX}))  # now seven of each
    assert clinic.solved() == []


def test_the_record_of_groups_is_kept_for_whole_sets_too(tmp_path: Path) -> None:
    """Groups of one run, and in the next all but one of the patients of one of them."""
    rows = persons((9, "F", 30), (9, "M", 30))
    clinic, names = Clinic(tmp_path, rows), [p.name for p in rows]
    clinic.run(names, {"sex": SEX})
    assert clinic.run(names[:8], {"sex": SEX}) == SiteGroups()
    lines = (tmp_path / "history" / SETS).read_text().splitlines()
    assert sum('"group": true' in line for line in lines) == 2


def test_small_groups_are_among_the_others_and_never_follow_from_the_rest() -> None:
    def parts(least: int, **sizes: int) -> dict[str, int]:
        column = Column(values={name: (name,) for name in sizes if name != OTHER})
        labels = [name for name, size in sizes.items() for _ in range(size)]
        return {name: len(places) for name, places in parted(column, labels, least).items()}

    assert parts(5, a=9, b=7) == {"a": 9, "b": 7}
    assert parts(5, a=9, b=7, c=5, d=2) == {"a": 9, "b": 7, OTHER: 7}
    assert parts(5, a=9, b=7, c=3, d=2) == {"a": 9, "b": 7, OTHER: 5}
    assert parts(5, a=9, other=2) == {}
    assert parts(5, a=9, b=7, other=1) == {"a": 9, OTHER: 8}
    assert parts(5, a=9) == parts(5, a=4, b=4) == parts(1, a=3) == {}
    assert parts(1, a=2, b=1, other=1) == {"a": 2, "b": 1, OTHER: 1}


def test_a_metric_that_few_of_a_group_have_stays_in_all_groups(tmp_path: Path) -> None:
    """Two women without a tumour: from all and the men, their number would follow."""
    rows = persons((10, "F", 30), (10, "M", 30))
    healthy = [Person(p.name, p.sex, p.age, {**p.values, "dice": np.nan}) for p in rows[:2]]
    clinic = Clinic(tmp_path, [*healthy, *rows[2:]])
    said = clinic.run([p.name for p in rows], {"sex": SEX})
    assert {m for c in said.columns for g in c.groups for m in g.rows["federated"]} == {"error"}


def test_a_metric_whose_patients_depend_on_the_model_stays(tmp_path: Path) -> None:
    names = names_of(range(20))
    every = {"dice": np.full(20, 0.5), "error": np.linspace(0, 1, 20)}
    other = {**every, "dice": np.where(np.arange(20) % 2, 0.5, np.nan)}
    file = write_table(tmp_path / "t.csv", persons((10, "F", 30), (10, "M", 30)))
    own = OwnGroups("A", SPECS, EgressRules(floor=LEAST), MeasuredSets(tmp_path), bytes(32))
    dataset: Any = SimpleNamespace(names=lambda split: names)
    said = own.answer(Groups(file=file, columns={"sex": SEX}), dataset, {"federated": every, "pooled": other})
    assert [sorted(g.rows["pooled"]) for g in said.columns[0].groups] == [["error"], ["error"]]


# The table ------------------------------------------------------------------------------------------------------------


def test_the_table_is_read_as_it_is_and_says_nothing_of_whom_it_contradicts(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("\ufeffid,gender,years\na,1.0, 39.5\nb,2.0,40\nb,2.0,40\nc,1.0,60\nc,2.0,60\ne,9,old\nf,,nan\n")
    declared = Groups(
        file=file,
        patient="id",
        columns={
            "sex": Column(column="gender", values={"male": (1.0,), "female": ("2.0",)}),  # type: ignore[dict-item]
            "age": Column(column="years", bands=(40, 60)),
        },
    )
    found = labels_of(declared, ["a", "b", "c", "d", "e", "f"], "A")
    assert found["sex"] == ["male", "female", *4 * [OTHER]]
    assert found["age"] == ["below 40", "40 to below 60", "60 or more", *3 * [OTHER]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"patient,hiv\nDoe-1,yes\n", "sites.A.groups.file: there is no column 'sex'"),
        (b"patient,sex\n\xff\xfe", "it is no CSV in UTF-8"),
        (b"patient,sex\nDoe-2,F\n", "its column 'patient' names none of the site's test patients"),
        (None, "cannot be read"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_error_without_a_patient(
    tmp_path: Path, text: bytes | None, said: str
) -> None:
    file = tmp_path / "t.csv"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(DataError, match=said) as caught:
        labels_of(Groups(file=file, columns={"sex": SEX}), ["Doe-1"], "A")
    assert not any(word in str(caught.value) for word in ("Doe", "hiv", str(tmp_path)))


# Whole runs -----------------------------------------------------------------------------------------------------------


def declaring(folder: Path, sites: SitesFile, names: str = "ABC", **update: Any) -> SitesFile:
    """The same sites, some of which declare sex, 4 women among their 7 test patients, or half of more."""
    found = dict(sites.sites)
    for site in names:
        rows = [Person(f"Doe-{n}", "MF"[n % 2], 20 + n, {}) for n in range(40)]
        groups = Groups(file=write_table(folder / f"{site}.csv", rows), columns={"sex": SEX})
        found[site] = found[site].model_copy(update={"groups": groups, **update})
    return SitesFile(sites=found).with_code()


def test_a_run_on_one_machine_gives_every_group_of_every_arm(tmp_path: Path) -> None:
    study = cohort_study(sites={"A": {}, "B": {}, "C": {"role": "unseen"}, "D": {"role": "evaluate"}})
    folders = ruled(tmp_path)
    (tmp_path / "D").mkdir()
    folders = SitesFile(sites={**folders.sites, "D": folders.of("A").model_copy(update={"data": (tmp_path / "D",)})})
    sites = declaring(tmp_path, folders, "ACD")
    result = run(study, sites, tmp_path / "out", compare=("local", "pooled"), engine="local", allow_code=True)
    assert [(g.column, g.group) for g in result.groups] == [("sex", "female"), ("sex", "male")]
    for group, odd in zip(result.groups, (1, 0), strict=True):
        assert set(group.metrics) == {"local", "federated", "pooled"}
        assert set(group.metrics["federated"]) == {"A", "C", "D"}
        assert set(group.metrics["local"]) == {"A"}
        for site in "ACD":
            of_group = [place for place in range(7) if (9 + place) % 2 == odd]
            patients = table_of(result.out, site)[("federated", "mse")][of_group]
            told = group.estimate("federated", site, "mse")
            assert told is not None
            assert (told.n, told.value) == (len(of_group), pytest.approx(patients.mean(), abs=1e-6))
    assert result.groups_missing == {}
    assert evaluate(result.out, sites, engine="local", allow_code=True).groups == result.groups


@pytest.mark.slow
def test_parties_apart_give_the_same_and_the_mean_where_all_do(tmp_path: Path) -> None:
    sites = declaring(tmp_path, ruled(tmp_path, minimum_cohort=3))
    here = run(cohort_study(), sites, tmp_path / "here" / "out", engine="local", allow_code=True)
    (tmp_path / "C.csv").unlink()
    there = apart(cohort_study(), sites, tmp_path / "there")
    group = here.groups[0]
    values = [group.estimate("federated", site, "mse") for site in "ABC"]
    mean = group.estimate("federated", "mean", "mse")
    assert mean is not None
    assert mean.value == pytest.approx(np.mean([v.value for v in values if v]), abs=1e-6)
    assert mean.n == 12
    # A table that is gone costs its site its groups, and no other.
    assert there.groups_missing == {"C": "DataError: sites.C.groups.file: cannot be read (No such file or directory)"}
    for group, other in zip(here.groups, there.groups, strict=True):
        table = group.metrics["federated"]
        assert other.metrics["federated"] == {site: table[site] for site in "AB"}


PRIVACY = {
    "protection": {"privacy": {"noise_multiplier": 2.0, "patients_per_step": 2}},
    "method": {"weights": "equal"},
    "schedule": {"rounds": 1, "release": "last"},
}


@pytest.mark.parametrize(
    ("egress", "why"),
    [
        ({"per_site_results": False}, "egress.per_site_results is false"),
        ({"minimum_cohort": 8}, "gave no results of its own"),
        ({"minimum_cohort": 4}, "make no two groups of 4 or more"),
        ({"metrics": ["mse"]}, "gave no results of its own"),
    ],
)
def test_groups_stay_where_results_do(
    tmp_path: Path, egress: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = recorded_sessions(monkeypatch)
    sites = declaring(tmp_path, ruled(tmp_path, **egress), "A")
    result = run(cohort_study(), sites, tmp_path / "out", engine="local", allow_code=True)
    assert result.groups == ()
    assert result.groups_missing.keys() == {"A"}
    assert why in result.groups_missing["A"]
    assert not any(b"female" in one.data or b"Doe-" in one.data for one in sent)


def test_a_secure_run_gives_groups_as_it_gives_results_and_a_private_one_none(tmp_path: Path) -> None:
    sites = declaring(tmp_path, ruled(tmp_path, minimum_cohort=3))
    secure = cohort_study(protection={"secure": True})
    result = run(secure, sites, tmp_path / "secure", compare=("local",), engine="local", allow_code=True)
    assert set(result.groups[0].metrics) == {"local", "federated"}
    private = run(cohort_study(**PRIVACY), sites, tmp_path / "private", engine="local", allow_code=True)
    assert private.groups == ()
    assert "protection.privacy" in private.groups_missing["A"]
    assert private.metrics["federated"]["A"] is not None


def test_a_message_by_group_holds_words_of_the_file_and_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = recorded_sessions(monkeypatch)
    sites = declaring(tmp_path, ruled(tmp_path, minimum_cohort=3), "B")
    result: Result = run(cohort_study(), sites, tmp_path / "out", engine="local", allow_code=True)
    told = {
        s.message.header.site: s.message.header.meta
        for s in sent
        if s.message.header.kind == GROUPS and s.message.header.reply_to
    }
    assert told["A"] == told["C"] == {"columns": []}
    groups = told["B"]["columns"][0]["groups"]
    assert [group["name"] for group in groups] == ["female", "male"]
    assert set(groups[0]["rows"]["federated"]["mse"]) == {"n", "value", "se", "absent"}
    # Fewer than 5 have no standard error.
    assert groups[0]["rows"]["federated"]["mse"]["se"] is None
    assert not any(b"Doe-" in one.data for one in sent)
    assert "Doe-" not in (result.out / "report.html").read_text() + (result.out / "model_card.md").read_text()


def test_check_counts_the_groups_for_eyes_at_the_site(tmp_path: Path) -> None:
    declared = declaring(tmp_path, ruled(tmp_path), "A").sites
    few = {**declared, "B": declared["A"].model_copy(update={"egress": Egress(minimum_cohort=4)})}
    silent = {**few, "C": few["A"].model_copy(update={"egress": Egress(per_site_results=False)})}
    lines = list(group_lines(Machine(cohort_study(), SitesFile(sites=silent).with_code(), NOWHERE, ())))
    assert lines == [
        "A: sex (female 4, male 3)",
        "B: sex (stays: its test patients make no two groups of 4 or more)",
        "C: nothing, as egress.per_site_results is false",
    ]


def test_a_table_that_cannot_be_used_stops_a_run_on_one_machine_before_it_begins(tmp_path: Path) -> None:
    sites = declaring(tmp_path, ruled(tmp_path), "B")
    (tmp_path / "B.csv").write_text("patient,gender\nDoe-9,F\n")
    with pytest.raises(DataError, match=r"sites\.B\.groups\.file: there is no column 'sex'"):
        run(cohort_study(), sites, tmp_path / "out", engine="local", allow_code=True)
    assert not (tmp_path / "out").exists()
