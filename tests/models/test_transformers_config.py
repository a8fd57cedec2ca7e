"""What a study says of a network of Hugging Face transformers; the library itself is not needed to read it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.diagnoses import SIZE, diagnosis_study

from wardround.errors import MissingExtra, StudyError
from wardround.models.transformers_classifier import TransformersSettings
from wardround.study.load import load_study, study_sha256, written

_BLOCKS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIZE, "patch_size": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "vit": {"model_type": "vit", **_BLOCKS, "intermediate_size": 32},
    "dinov2": {"model_type": "dinov2", **_BLOCKS},
    "dinov2_with_registers": {"model_type": "dinov2_with_registers", **_BLOCKS},
    "swin": {
        "model_type": "swin", "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 2, "patch_size": 4,
        "image_size": SIZE, "drop_path_rate": 0.0,
    },
}  # fmt: skip


def section(kind: str, **changes: Any) -> dict[str, Any]:
    return {"kind": "transformers", "config": {**CONFIGS[kind], **changes}}


def folder_of(place: Path, kind: str, **changes: Any) -> Path:
    """A study with a folder `model` beside it that holds a `config.json`."""
    (place / "model").mkdir(parents=True)
    (place / "model" / "config.json").write_text(json.dumps({**CONFIGS[kind], **changes}))
    study = written(diagnosis_study({"A": {}}))
    (place / "study.yaml").write_text(json.dumps({**study, "model": {"kind": "transformers", "folder": "model"}}))
    return place / "study.yaml"


def test_the_hashes_of_a_study_cover_what_decides_the_network_and_nothing_else(tmp_path: Path) -> None:
    one = load_study(folder_of(tmp_path / "one", "dinov2"))
    same = load_study(folder_of(tmp_path / "same", "dinov2", transformers_version="4.0", architectures=["Other"]))
    other = load_study(folder_of(tmp_path / "other", "dinov2", num_attention_heads=4))
    assert study_sha256(one) == study_sha256(same) != study_sha256(other)
    # What is written of a run or a released model needs no folder.
    assert study_sha256(load_study(written(one))) == study_sha256(one)
    assert one.model.describe() == "transformers, dinov2, 2 blocks of width 16, patch 4"


def _refusal(place: Path, **changes: Any) -> str:
    study = folder_of(place, "vit", **changes)
    with pytest.raises(StudyError) as caught:
        load_study(study)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "names code of its own (auto_map), which is never run"),
        ({"model_type": "clip"}, 'is of "clip"; served are vit, dinov2, dinov2_with_registers, swin'),
        ({"image_size": [16, 32]}, "is no square, and positions are interpolated from one"),
        ({"hidden_act": "evil"}, "must be 'gelu', "),
        ({"model_type": "dinov2", "use_swiglu_ffn": True}, "use_swiglu_ffn: must be False; take another model"),
        ({"hidden_size": "16; import os"}, "model/config.json: hidden_size: must be a valid integer"),
    ],
)
def test_a_config_that_is_not_served_is_one_clear_error(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    assert says in _refusal(tmp_path, **changes)


def test_a_folder_is_looked_for_below_a_study_s_file_and_nowhere_else(tmp_path: Path) -> None:
    study = folder_of(tmp_path, "vit")
    given = json.loads(study.read_text())
    for folder, says in (
        ("../model", "is no path below the study's folder"),
        ("/etc", "is no path below the study's folder"),
        ("other", "other has no config.json; put it there, below the study's folder"),
    ):
        study.write_text(json.dumps({**given, "model": {"kind": "transformers", "folder": folder}}))
        with pytest.raises(StudyError, match=says):
            load_study(study)
    # A study that came in a message or with a model reads nothing of the machine.
    with pytest.raises(StudyError, match="lies beside a study's file, and this study is none"):
        load_study({**given, "model": {"kind": "transformers", "folder": "model"}})
    assert load_study({**given, "model": {"kind": "transformers", "folder": "model"}}, near=tmp_path)
    (tmp_path / "model" / "config.json").write_text("{")
    study.write_text(json.dumps(given))
    with pytest.raises(StudyError, match=r"model/config\.json is no JSON of a network"):
        load_study(study)


def test_sizes_that_do_not_fit_are_one_clear_error() -> None:
    with pytest.raises(StudyError, match=r"task\.size: 16 x 18 is no whole number of patches of 4"):
        TransformersSettings.model_validate(section("vit")).check_size((16, 18))
    swin = TransformersSettings.model_validate(section("swin", window_size=4))
    with pytest.raises(StudyError, match=r"task\.size: 16 x 16 is smaller than a window of the last stage, 32 x 32"):
        swin.check_size((16, 16))
    with pytest.raises(StudyError, match="is for pictures and slices; give"):
        swin.build_classifier(3, 3, 2)


def test_without_the_library_an_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"wardround\[foundation\]"):
        TransformersSettings.model_validate(section("vit")).build_classifier(2, 3, 2)
