"""The law of silence: nothing private is in any byte that crosses the seam, in either direction."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.ct_hospitals import ct_study, make_ct_hospitals
from tests.federation.rig import Recorder, Rig, Sent, recorded_sessions
from tests.scanners import scanner_study
from tests.toys import toy_sites, toy_study
from wardround.engines.local import LocalEngine
from wardround.federation.exchange import ERROR, EVALUATE, Call
from wardround.federation.facts import DELIVER, FACTS, SiteFacts
from wardround.federation.grouped import GROUPS, SiteGroups
from wardround.runs.session import Result, evaluate, run
from wardround.storage.store import SiteStore
from wardround.study.schema import Study
from wardround.study.sites import Egress, SiteData, SitesFile
from wardround.wire.message import Header, Message
from wardround.wire.ring import ExactSum
from wardround.wire.update import Aggregate

HEADER = {
    "schema", "kind", "study", "site", "round", "attempt", "phase", "reply_to", "meta", "tensors",
    "body_nbytes", "body_sha256",
}  # fmt: skip
ROUNDS = ("train", "update", "evaluate", "release", "done")
META = {
    "keep", "validate", "aborted", "layout", "scales", "split", "evaluator", "picture", "unseen_site", "model", "again",
    "reason", "kind", "anchor", "heads", "log", "against", "baseline", "local_sha256", "card",
}  # fmt: skip
SITES = ("Alpha", "Beta", "Gamma")
# A window of 8 bytes with fewer different ones is a pair of zeros, ones or small counters: it says nothing.
TELLING = 6
FEDBN = {"kind": "fedbn"}


def private_study(optimizer: str = "adam", method: Mapping[str, Any] = FEDBN, **changes: Any) -> Study:
    return toy_study(
        SITES,
        method=dict(method),
        task={"kind": "custom", "factory": "tests.toys:make_task", "options": {"norm": True}},
        local={"steps": 3, "batch": 4, "optimizer": optimizer, "lr": 0.05, "optimizer_state": "keep"}
        | ({"momentum": 0.9} if optimizer == "sgd" else {}),
        schedule={"rounds": 3},
        **changes,
    )


def windows(data: bytes, size: int = 8) -> Iterator[bytes]:
    """All telling windows of whole float32 values."""
    for start in range(0, len(data) - size + 1, 4):
        window = data[start : start + size]
        if len(set(window)) >= min(TELLING, size - 1):
            yield window


def leaks(sent: Iterable[Sent], secrets: Iterable[bytes]) -> list[bytes]:
    """The secrets that lie somewhere in the bytes of a message."""
    stream = b"\0".join(s.data for s in sent)
    return [secret for secret in secrets if secret in stream]


def memories(out: Path) -> dict[str, bytes]:
    """Every tensor that a site of the federation keeps, in all rounds kept."""
    found: dict[str, bytes] = {}
    for site in SITES:
        store = SiteStore(out / "work" / "sites" / site / "federated")
        for number in range(4):
            for name, tensor in store.memory(number).tensors.items():
                found[f"{site}/{number}/{name}"] = np.ascontiguousarray(tensor).tobytes()
        store.close()
    return found


# By method: what a site keeps.
KEPT: dict[str, tuple[dict[str, Any], set[str]]] = {
    "fedbn": ({"kind": "fedbn"}, {"local", "optimizer"}),
    "ditto": ({"kind": "ditto", "pull": [0.1, 1.0]}, {"local", "optimizer", "own", "received"}),
    "apfl": ({"kind": "apfl"}, {"local", "optimizer", "mixture", "received", "method"}),
    "fedrep": ({"kind": "fedrep", "head": ["3.*"], "head_steps": 2}, {"local", "optimizer"}),
    # Encoders go to all sites, and nothing else does.
    "fedmri": ({"kind": "fedmri", "encoder": ["0.*"], "contrast": 0.1}, {"local", "optimizer"}),
    "fair_weights": ({"kind": "fair_weights"}, {"local", "optimizer", "method"}),
}


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        ("sgd", "fedbn"),
        *(("adam", kind) for kind in ("fedbn", "ditto", "apfl", "fedrep")),
        *(pytest.param("adam", kind, marks=pytest.mark.slow) for kind in ("fedmri", "fair_weights")),
    ],
)
def test_no_private_tensor_and_no_example_is_in_any_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, kind: str
) -> None:
    sent = recorded_sessions(monkeypatch)
    folder = tmp_path / "Archive-Doe-Jane"
    sites = toy_sites(folder, SITES)
    method, stays = KEPT[kind]
    study = private_study(optimizer, method)
    result = run(study, sites, tmp_path / "out", engine="local")
    evaluate(tmp_path / "out", sites, engine="local")
    assert {s.message.header.kind for s in sent} == {*ROUNDS, "facts", "groups", "deliver"}

    kept = memories(tmp_path / "out")
    assert {name.split("/")[2] for name in kept} == stays
    local = [w for name, data in kept.items() for w in windows(data)]
    assert len(local) > 50
    rig = Rig(study, tmp_path / "rig")
    examples = [w for s in SITES for t in (rig.host.dataset(s).x, rig.host.dataset(s).y)  # type: ignore[attr-defined]
                for w in windows(t.numpy().tobytes(), 4)]  # fmt: skip
    assert len(examples) > 200
    # What is searched for can be found: the shared model is in the messages, window by window.
    shared = (tmp_path / "out" / "work" / "released" / "federated").read_bytes()
    assert len(leaks(sent, windows(shared))) == len(list(windows(shared)))

    names = [str(folder).encode(), str(tmp_path).encode(), b"Archive-Doe-Jane"]
    assert leaks(sent, {*local, *examples, *names}) == []
    assert set(result.local_sha256) == set(SITES)


def test_headers_say_only_what_their_schema_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = recorded_sessions(monkeypatch)
    run(private_study(), toy_sites(tmp_path, SITES), tmp_path / "out", engine="local")
    shared = {"0.weight", "0.bias", "3.weight", "3.bias"}
    for one in sent:
        header = json.loads(one.message.header.to_bytes())
        assert header.keys() == HEADER
        if header["kind"] == FACTS:
            assert header["meta"].keys() == {"plan"} or SiteFacts.model_validate(header["meta"])
            continue
        if header["kind"] == GROUPS:
            assert header["meta"].keys() == {"plan"} or SiteGroups.model_validate(header["meta"])
            continue
        assert header["meta"].keys() <= META
        if header["meta"].get("evaluator") != "released":
            assert {row["name"].split("/", 1)[1] for row in header["tensors"]} <= shared
        scales = header["meta"].get("scales", {})
        assert {name.split("/", 1)[1] for name in scales} <= shared
        if one.message.header.reply_to:
            assert header["meta"].keys() <= {"layout", "log", "reason", "kind", "local_sha256"}


def test_a_released_model_carries_the_initial_values_of_what_stays_at_the_sites(tmp_path: Path) -> None:
    result = run(private_study(), toy_sites(tmp_path, SITES), tmp_path / "out", engine="local")
    released = load_file(result.out / "models" / "federated.safetensors")
    initial = Rig(private_study(), tmp_path / "rig").host.model_context.initial
    private = {name for name in released if name.startswith("1.")}
    assert len(private) == 5
    assert all(np.array_equal(released[name], initial[name].numpy()) for name in private)


@pytest.mark.parametrize("unseen", ["initial", "mean"])
def test_private_parts_are_in_the_sum_only_where_the_study_declares_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unseen: str
) -> None:
    """Declared, how far a site's part is from its start is a group of its updates; their mean goes to no site."""
    sent = recorded_sessions(monkeypatch)
    study = scanner_study({"kind": "hyperfed", "unseen": unseen}, SITES)
    out = run(study, toy_sites(tmp_path, SITES), tmp_path / "out", engine="local").out
    kept = memories(out)
    rig = Rig(study, tmp_path / "rig")
    arm_spec, initial = rig.arm_spec, rig.host.model_context.initial_values()

    def trained(name: str, data: bytes) -> Iterator[bytes]:
        """Pairs of values that training moved; others are the initial ones, which everybody knows, but for an ulp."""
        values = np.frombuffer(data, dtype=np.float32)
        moved = np.abs(values - initial[name].ravel()) > 1e-5
        yield from (values[i : i + 2].tobytes() for i in range(len(values) - 1) if moved[i : i + 2].all())

    private = {
        window
        for name, data in kept.items()
        if "hypernetwork" in name
        for window in trained(name.partition("/local/")[2], data)
    }
    assert len(private) > 100
    assert leaks(sent, private) == []

    declared = {g.name for g in arm_spec.layout.groups} - {"model", "buffers"}
    assert declared == ({"unseen"} if unseen == "mean" else set())
    updates = [s for s in sent if s.message.header.kind == "update" and asked(sent, s).kind == "train"]
    assert len(updates) == 9
    for update in updates:
        assert len(update.body) == arm_spec.layout.nbytes
        total = ExactSum(arm_spec.layout.segments)
        total.add(update.body, 0)
        said = Aggregate(arm_spec.layout, total, asked(sent, update).meta["scales"])
        header = update.message.header
        for name in (n for n in initial if n.startswith("hypernetwork.") and declared):
            data = kept[f"{header.site}/{header.round}/local/{name}"]
            change = np.frombuffer(data, dtype=np.float32).reshape(initial[name].shape) - initial[name]
            assert np.allclose(said.mean("unseen", name), change, atol=1e-6)

    # Downwards: never in a round, and at the end only in the released model.
    mean = {n: t for n, t in load_file(out / "models" / "federated.safetensors").items() if "hypernetwork" in n}
    moved = [n for n in mean if not np.array_equal(mean[n], initial[n])]
    assert len(moved) == (len(mean) if declared else 0)
    secrets = {w for n in moved for w in trained(n, mean[n].tobytes())}
    downwards = [s for s in sent if s.message.header.meta.get("evaluator") != "released" and not delivered(s)]
    assert leaks(downwards, secrets) == []
    assert len(leaks(sent, secrets)) == len(secrets)


def test_neither_embeddings_of_patients_nor_what_headers_say_is_in_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model with an anatomy prompt, trained on DICOM: its update is all that tells of them."""
    sent = recorded_sessions(monkeypatch)
    random, entries, secrets = np.random.default_rng(0), {}, set[bytes]()
    for site, folder in make_ct_hospitals(tmp_path / "hospitals").items():
        vectors = {f.name: random.standard_normal(12).astype(np.float32) for f in sorted(folder.iterdir())}
        np.savez(tmp_path / f"{site}.npz", **vectors)  # type: ignore[arg-type]
        entries[site] = SiteData(data=(folder,), embeddings=tmp_path / f"{site}.npz")
        for vector in vectors.values():
            # As it is, and as the network sees it after pooling.
            secrets |= {*windows(vector.tobytes()), *windows(vector.reshape(-1, 3).mean(1).tobytes())}
    anatomy = {"dimension": 12, "pool": 3, "width": 8, "heads": 2, "map": 5}
    study = ct_study(
        model={"kind": "redcnn", "preset": "tiny", "conditioning": "bottleneck", "anatomy": anatomy},
        method={"kind": "scan_physfed", "unseen": "mean"},
        schedule={"rounds": 2, "release": "last"},
    )
    study["task"]["evaluation"] |= {"baselines": []}
    out = run(study, SitesFile(sites=entries), tmp_path / "out", engine="local").out
    assert len(secrets) > 100
    names = {b"Doe-Jane", b"Roe-Jim", b".npz", b"SIEMENS", b"Sensation", b"B30f", str(tmp_path).encode()}
    assert leaks(sent, secrets) == []
    # What headers name is in the answer to `facts` and in the card, where the sites' rules let it out.
    assert leaks([s for s in sent if s.message.header.kind != FACTS and not delivered(s)], names) == []
    released = (out / "models" / "federated.safetensors").read_bytes()
    assert not [secret for secret in secrets if secret in released]
    # What is searched for could be found: the prompt's part of the network is in the messages.
    branch = load_file(out / "models" / "federated.safetensors")["anatomy.projection.weight"]
    assert leaks(sent, windows(branch.tobytes()))


def delivered(one: Sent) -> bool:
    """Whether a message brings the released model."""
    return one.message.header.kind == DELIVER


def asked(sent: Iterable[Sent], reply: Sent) -> Header:
    """The header of the request that a message answers."""
    (request,) = (s for s in sent if s.message.id == reply.message.header.reply_to)
    return request.message.header


def test_nothing_frozen_or_private_is_in_an_update_even_where_all_is_shared(tmp_path: Path) -> None:
    """A reply's body is fixed point throughout: not even the shared weights are in it as they are."""
    rig = Rig(toy_study(method={"kind": "fedavg", "weights": "equal"}), tmp_path)
    state = rig.train()
    replies = [s for s in rig.engine.sent if s.message.header.kind == "update"]
    assert leaks(replies, windows(state.public.path.read_bytes())) == []


def test_an_error_at_a_site_leaves_no_trace_of_whose_scan_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = recorded_sessions(monkeypatch)
    study = toy_study(task={"kind": "custom", "factory": "tests.toys:make_task", "options": {"fail": "B"}})
    sites = toy_sites(tmp_path / "MEIER", tuple(study.sites))
    result = run(study, sites, tmp_path / "out", engine="local")
    replies = [s for s in sent if s.message.header.kind == ERROR]
    assert {s.message.header.site for s in replies} == {"B"}
    assert {s.message.header.meta["reason"] for s in replies} == {"RuntimeError"}
    assert {s.message.header.meta["kind"] for s in replies} == {"error"}
    told = [b"DOE", b"JANE", b"_1960", b".nii", b"cannot read", b"MEIER", str(tmp_path).encode()]
    assert leaks(sent, told) == []
    files = [(result.out / name).read_bytes() for name in ("result.json", "rounds.jsonl")]
    assert not [secret for secret in told for data in files if secret in data]


@pytest.mark.slow
def test_what_a_site_logs_in_a_worker_process_names_no_patient(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its stderr is the run's, which services and batch jobs keep for others to read."""
    study = toy_study(
        task={"kind": "custom", "factory": "tests.toys:make_task", "options": {"fail": "B"}}, schedule={"rounds": 1}
    )
    sites = toy_sites(tmp_path / "MEIER", tuple(study.sites))
    run(study, sites, tmp_path / "out", engine="workers", processes=1)
    said = capfd.readouterr().err
    assert "site B could not answer 'train': RuntimeError" in said
    assert not [told for told in ("DOE", "JANE", ".nii", "cannot read", "MEIER", str(tmp_path)) if told in said]


class _Nosy(LocalEngine):
    """Sites whose every answer fails with an error of our own that quotes a path."""

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        for message in messages:
            yield from super().exchange([replace(message, header=replace(message.header, kind="/data/DOE^JANE.nii"))])


def test_a_request_that_quotes_a_path_is_not_quoted_back(tmp_path: Path) -> None:
    rig = Rig(toy_study(), tmp_path)
    engine = Recorder(_Nosy(lambda header: rig.sites[header.site]))
    call = Call(EVALUATE, rig.arm_spec.identity, 0, ("A",), rig.arm_spec.metrics_layout, {})
    (reply,) = engine.exchange([call.message("A")])
    assert reply.header.kind == ERROR
    assert b"DOE" not in reply.header.to_bytes()


def test_a_site_that_withholds_its_results_says_nothing_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = recorded_sessions(monkeypatch)
    sites = toy_sites(tmp_path, SITES)
    closed = sites.sites["Beta"].model_copy(update={"egress": Egress(per_site_results=False)})
    sites = sites.model_copy(update={"sites": {**sites.sites, "Beta": closed}})
    result: Result = run(private_study(), sites, tmp_path / "out", engine="local")
    evaluations = {
        s.message.header.reply_to: s for s in sent if s.message.header.site == "Beta" and s.message.header.reply_to
    }
    asked = [s for s in sent if s.message.header.meta.get("evaluator") and s.message.header.site == "Beta"]
    assert asked
    for request in asked:
        reply = evaluations[request.message.id]
        assert reply.message.header.kind == ERROR
        assert reply.body == b""
        assert reply.message.header.meta.keys() == {"reason", "kind"}
        assert reply.message.header.meta["kind"] == "Withheld"
        assert not any(c.isdigit() for c in reply.message.header.meta["reason"])
    assert result.metrics["federated"]["Beta"] is None
    assert "per_site_results" in result.withheld["Beta"]
