"""Nothing about a patient survives in what a site says of an error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.examples import examples
from tests.federation.rig import Rig
from tests.toys import toy_study

from wardround.deidentify import describe_error, scrub
from wardround.errors import DataError, GeometryError, WardroundError
from wardround.learning.training import Learner

PLANTED = [
    "/data/clinic/MUELLER_HANS_19610423/flair.nii.gz",
    "'/mnt/Hans Mueller/scan 1.dcm'",
    r"C:\scans\mueller\series.dcm",
    "~/mueller/x",
    "sub-mueller/anat/sub-01_T1w.nii",
    "mueller.nii.gz",
    "Mueller-Hans.DCM",
    "MUELLER^HANS",
    "TCGA_CS_4941",
    "1.2.840.113619.2.55.3",
    "19610423",
    "1961-04-23",
    "23.04.1961",
    "MRN0012345",
    "00123456",
]


@pytest.mark.parametrize("planted", PLANTED)
def test_shapes_of_identity_are_removed(planted: str) -> None:
    scrubbed = scrub(f"cannot read {planted} here")
    assert scrubbed.startswith("cannot read [")
    assert scrubbed.endswith("] here")
    assert "mueller" not in scrubbed.lower()
    assert not any(part in scrubbed for part in ("4941", "0012345", "1961", "113619"))


@pytest.mark.parametrize(
    "text",
    [
        "site CS, contrast t1ce: 3 of 12 patients lack the contrast t1ce",
        "images of 512 x 512 pixels are too far from the study's size 128 x 128",
        "tensor blocks.0.conv.weight has shape (64, 64, 3, 3), 16384 bytes, scale 1e-05",
        "calibration=0.08 alone exceeds the 1/4.0 of lines; `sites.CS.data`",
    ],
)
def test_what_helps_stays(text: str) -> None:
    assert scrub(text) == text


@given(st.text())
@example("0^\\")
def test_scrubbing_twice_changes_nothing_more(text: str) -> None:
    assert scrub(scrub(text)) == scrub(text)


@pytest.mark.parametrize("error", [OSError(2, "No such file", "/data/mueller"), ValueError("mueller"), KeyError("m")])
def test_errors_of_others_become_their_class(error: Exception) -> None:
    assert describe_error(error) == type(error).__name__


def test_own_errors_keep_their_message_and_never_their_detail() -> None:
    error = DataError("site CS: an image is constant", detail="/data/mueller/flair.nii.gz")
    assert describe_error(error) == "DataError: site CS: an image is constant"
    assert describe_error(GeometryError("see /data/mueller")) == "GeometryError: see [path]"


# Whatever a name hides in: messages, arguments, notes, causes, groups, files, details.
NAMES = st.sampled_from(["MUELLER^HANS", "/data/Mueller_Hans/flair.nii.gz", "Mueller-Hans.DCM", "MRN0012345"])


def _chained(name: str) -> Exception:
    try:
        try:
            raise KeyError(name)
        except KeyError as cause:
            raise DataError("site A: a volume is constant", detail=name) from cause
    except DataError as error:
        error.add_note(f"while reading {name}")
        return error


def _undecodable(name: str) -> Exception:
    try:
        (name.encode() + b"\xff").decode()
    except UnicodeDecodeError as error:
        return error
    raise AssertionError


KINDS = st.sampled_from(
    [
        lambda name: ValueError(f"cannot read {name}"),
        lambda name: KeyError(name),
        lambda name: OSError(2, "No such file or directory", name),
        lambda name: RuntimeError({"patient": name}, [name]),
        lambda name: ExceptionGroup(name, [ValueError(name), DataError(name)]),
        lambda name: MemoryError(name),
        lambda name: AssertionError(name),
        lambda name: DataError(f"cannot read {name}"),
        lambda name: GeometryError(f"of {name}: too small", detail=name),
        lambda name: WardroundError(f"'{name}' and {name}, {name}"),
        _chained,
        _undecodable,
    ]
)


@given(NAMES, KINDS, st.booleans())
def test_no_planted_name_survives_any_kind_of_error(name: str, kind: Callable[[str], Exception], nested: bool) -> None:
    error: BaseException = kind(name)
    if nested:
        error = BaseExceptionGroup(name, [error])
    said = describe_error(error).lower()
    assert not any(part in said for part in ("mueller", "hans", "0012345", "flair"))
    assert said.startswith(type(error).__name__.lower())


@given(NAMES, KINDS)
@settings(max_examples=examples(10), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_planted_name_leaves_a_site_or_enters_its_log(
    tmp_path_factory: pytest.TempPathFactory, name: str, kind: Callable[[str], Exception]
) -> None:
    folder = tmp_path_factory.mktemp("planted")
    rig = Rig(toy_study(schedule={"rounds": 1}), folder)

    def fails() -> Learner:
        raise kind(name)

    rig.sites["B"]._make_learner = fails
    rig.train()
    told = [sent.data.lower() for sent in rig.engine.sent] + [p.read_bytes().lower() for p in folder.rglob("log.jsonl")]
    assert len(told) > 6
    assert not any(part in data for data in told for part in (b"mueller", b"hans", b"mrn0012345", b"flair"))
